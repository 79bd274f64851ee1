import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from minimind.cli import console
from minimind.cli.main import _with_home, app, errors_as_messages
from minimind.environment import NATIVE_VARIABLE, python_module
from minimind.errors import ConfigError
from minimind.version import __version__
from tests.support.commands import fast_python

# The command line with an extra command `work`, whose body a test supplies.
WITH_WORK = """
import sys
from minimind.cli.main import app, main

@app.command()
def work() -> None:
    {body}

main()
"""


def run(
    *arguments: str, body: str = "pass", stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    python = [sys.executable] if environment else fast_python()
    return subprocess.run(
        [*python, "-c", WITH_WORK.format(body=body), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | environment,
        timeout=60,
    )


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import atexit, sys\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'pyarrow', 'tokenizers', 'transformers'}\n"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules))))\n"
        "import runpy; runpy.run_module('minimind', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "Usage: minimind [OPTIONS] COMMAND" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"minimind {__version__}\n")


def test_without_arguments_it_shows_the_first_steps() -> None:
    done = run()
    assert done.returncode == 0
    commands = [
        line.split()[1] for line in done.stdout.splitlines() if line.startswith("  minimind")
    ]
    assert commands == ["demo", "chat", "tokenizer", "pretrain", "sft"]
    assert done.stdout.endswith("All commands: minimind --help\n")
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("group", [[], ["tokenizer"], ["data"], ["checkpoints"], ["export"]])
def test_no_description_of_a_command_is_cut_at_80_columns(group: list[str]) -> None:
    done = CliRunner().invoke(app, [*group, "--help"], terminal_width=80, prog_name="minimind")
    assert done.exit_code == 0
    listed = done.output.partition("Commands:\n")[2]
    assert listed and "..." not in listed and "…" not in listed
    assert max(map(len, listed.splitlines())) <= 80


def test_suggested_commands_work_when_minimind_is_not_on_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = Path(sys.executable).with_name("minimind")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(script.parents[1])
    assert (
        console.command("chat", Path("my model"))
        == f"{script.parent.name}/minimind chat 'my model'"
    )
    monkeypatch.chdir(tmp_path)
    assert console.command("chat", Path("a")) == f"{script} chat a"
    monkeypatch.setenv("PATH", str(script.parent))
    assert console.command("chat", Path("a")) == "minimind chat a"


@pytest.mark.parametrize("arguments", [["wrok"], ["work", "--frsh"], ["work", "more"]])
def test_usage_errors_exit_with_2(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Usage: minimind" in done.stderr
    assert "Traceback" not in done.stderr


def test_minimind_errors_print_one_line() -> None:
    body = "from minimind.errors import DataError; raise DataError('[b]长江.txt[/b]: 空')"
    done = run("work", body=body)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: [b]长江.txt[/b]: 空\n"


def test_bugs_keep_their_traceback() -> None:
    done = run("work", body="raise KeyError('bug')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "KeyError: 'bug'" in done.stderr


def test_ctrl_c_exits_with_130() -> None:
    done = run("work", body="import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    assert done.returncode == 130
    assert done.stderr.strip() == "stopped"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
@pytest.mark.parametrize("body", ["print('x' * 1_000_000)", "print('x')"])
def test_a_closed_pipe_is_silent(body: str) -> None:
    # The pipe has no reader, so the first byte breaks it.
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-c", WITH_WORK.format(body=body), "work"],
            stdout=pipe,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGPIPE, signal.SIG_IGN),
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
@pytest.mark.parametrize("terminal", [False, True])
def test_work_goes_on_when_its_messages_have_no_reader(tmp_path: Path, terminal: bool) -> None:
    """Such as that of `minimind pretrain … | tee log` after `tee` has ended; a closed terminal."""
    reading, writing = os.openpty() if terminal else os.pipe()
    os.close(reading)
    body = "from minimind.cli import console; console.say('x'); console.say('y'); open('end', 'w')"
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-c", WITH_WORK.format(body=body), "work"],
            stdout=pipe,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "end").exists()


def test_modules_of_the_current_folder_are_not_imported(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('the reader of this file')")
    done = subprocess.run(
        [*python_module("minimind"), "data", "stores"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX shells")
@pytest.mark.parametrize(
    ("word", "expanded"),
    [
        ("--out=~/a", "--out={home}/a"),
        ("-o=~", "-o={home}"),
        ("out=~/a", "out=~/a"),  # a setting: `Recipe` expands it
        ("--system=a~b", "--system=a~b"),
        ("~/a", "~/a"),  # quoted on purpose
    ],
)
def test_the_home_directory_in_an_option(
    word: str, expanded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _with_home(word) == expanded.format(home=tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX descriptors")
@pytest.mark.parametrize("descriptor", [0, 1, 2])
def test_standard_streams_may_be_closed(descriptor: int, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    body = "import sys; print('长江'); print(sys.stdin.read(), file=sys.stderr); "
    body += f"open({str(marker)!r}, 'w').close()"
    done = subprocess.run(
        [sys.executable, "-c", WITH_WORK.format(body=body), "work"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        preexec_fn=lambda: os.close(descriptor),
        timeout=60,
    )
    output = [b"" if descriptor == 1 else "长江\n".encode(), b"" if descriptor == 2 else b"\n"]
    assert [done.returncode, done.stdout, done.stderr] == [0, *output]
    assert marker.exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_reported() -> None:
    body = "open('/dev/full', 'w').write('x' * 100_000)"
    done = run("work", body=body)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the disk is full. Free some space")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ConfigError("r.toml:3: x is not a setting"), "error: r.toml:3: x is not a setting\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), "error: a.txt: No such file\n"),
        (OSError(errno.ENOSPC, "full", "out/a"), "error: out/a: the disk is full. Free"),
        (MemoryError(), "error: out of memory. In training, lower"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nmore"),
            "error: out of memory ([enforce fail] DefaultCPUAllocator: can't allocate memory).",
        ),
    ],
)
def test_user_and_machine_errors_print_one_line(
    raised: Exception, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as caught, errors_as_messages():
        raise raised
    assert caught.value.exit_code == 1
    assert capsys.readouterr().err.startswith(expected)


def test_cuda_out_of_memory_is_recognised_by_class(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(typer.Exit), errors_as_messages():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    assert "out of memory (CUDA out of memory" in capsys.readouterr().err


@pytest.mark.parametrize("raised", [OSError("no file in it"), RuntimeError("shape mismatch")])
def test_other_errors_propagate(raised: Exception) -> None:
    with pytest.raises(type(raised)), errors_as_messages():
        raise raised


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk", "utf-16"])
def test_pipes_are_utf_8_on_every_platform(encoding: str) -> None:
    body = "import sys; print('长江 é \\ud83d'); print('黄河 \\udcff', file=sys.stderr)"
    done = run("work", body=body, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "长江 é ?\n", "黄河 \\udcff\n")


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_a_terminal_without_chinese_prints_question_marks() -> None:
    ours, theirs = os.openpty()
    with open(ours, "rb", buffering=0) as terminal:
        subprocess.run(
            [sys.executable, "-c", WITH_WORK.format(body="print('长江')"), "work"],
            stdout=theirs,
            env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
            timeout=60,
            check=True,
        )
        os.close(theirs)
        assert terminal.read(100) == b"??\r\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows always has a home directory")
@pytest.mark.parametrize(
    ("arguments", "variable"),
    [
        (
            ["pretrain", "--tokenizer", "TOKENIZER", "--data", "TEXTS", "--out", "OUT"],
            "MINIMIND_CACHE",
        ),
        (["web", "OUT", "--port", "1"], "XDG_DATA_HOME"),
        (["data", "inspect", "~/texts"], "HOME"),
        (["eval", "OUT", "--data", "~nobody/exams", "--task", "gsm8k"], "HOME"),
    ],
)
def test_a_missing_home_prints_one_line(
    arguments: list[str],
    variable: str,
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A user without HOME and without an entry in the password database, as in some containers."""
    import pwd

    def missing(*_: object) -> None:
        raise KeyError

    for lookup in ("getpwuid", "getpwnam"):
        monkeypatch.setattr(pwd, lookup, missing)
    for name in os.environ.keys() - {"PATH"}:
        monkeypatch.delenv(name)
    monkeypatch.setenv(NATIVE_VARIABLE, "0")  # a process remembers why it cannot load the code
    texts = tmp_path / "texts.txt"
    texts.write_text("长江是中国最长的河流。\n" * 50, "utf-8")
    places = {"TOKENIZER": tokenizer_dir, "TEXTS": texts, "OUT": tmp_path / "out"}
    done = CliRunner().invoke(app, [str(places.get(word, word)) for word in arguments])
    assert done.exit_code == 1
    [error] = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert f"set {variable}" in error or f"variable {variable} to a folder" in error
