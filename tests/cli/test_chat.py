import codecs
import contextlib
import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner, Result

from minimind.cli.main import app
from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_records
from minimind.model import PRESETS, ModelConfig, Transformer, save_model
from minimind.tokenizer import Tokenizer, train_tokenizer
from tests.support.commands import fast_python
from tests.support.services import wait_until


def run(*arguments: object, stdin: str | bytes = "") -> Result:
    return CliRunner().invoke(app, ["chat", *map(str, arguments)], input=stdin)


@dataclass
class TerminalResult:
    """Exit code and output of a command whose stdin is a terminal."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def run_in_terminal(*arguments: object, lines: str) -> TerminalResult:
    """Run chat with lines typed into a terminal, where commands work."""
    pytest.importorskip("termios", reason="pseudo-terminals are POSIX")
    ours, theirs = os.openpty()
    os.write(ours, lines.encode() + b"\n\x04")  # Ctrl-D
    out, errors = io.StringIO(), io.StringIO()
    with (
        open(theirs, encoding="utf-8") as terminal,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("sys.stdin", terminal)
        status = app(["chat", *map(str, arguments)], standalone_mode=False)
    os.close(ours)
    return TerminalResult(status or 0, out.getvalue(), errors.getvalue())


def make_model(tokenizer: Tokenizer, context: int = 256) -> Transformer:
    """Return a random model whose greedy output is varied and does not stop by itself."""
    torch.manual_seed(0)
    shape = PRESETS["nano"] | {"vocab_size": tokenizer.vocab_size}
    model = Transformer(ModelConfig(**shape | {"max_position_embeddings": context}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.mul_(60 if writes else 6)
        model.head_weight[[tokenizer.im_end, tokenizer.end_of_text]] = 0
    return model


def save_constant_model(token: int, directory: Path, tokenizer: Tokenizer) -> None:
    model = make_model(tokenizer)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.head_weight.zero_()
        model.head_weight[:, 0] = 1
        model.head_weight[token, 0] = 2
    save_model(directory, model, tokenizer)


@pytest.fixture(scope="module")
def model_dir(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "model"
    save_model(directory, make_model(tokenizer), tokenizer)
    return directory


def saved(path: Path) -> list[list[dict[str, str]]]:
    """Return the conversations in a file, as fine-tuning reads them."""
    bad = InvalidRecords()
    conversations = [record.messages or [] for record in read_records([path], invalid=bad)]
    assert not bad.total
    return conversations


def test_stdout_of_a_pipe_has_only_the_answers_as_they_are_generated(model_dir: Path) -> None:
    flags = ["--max-new-tokens", "9", "--temperature", "0"]
    with subprocess.Popen(
        [*fast_python(), "-m", "minimind", "chat", model_dir, *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
    ) as talk:
        assert talk.stdin
        assert talk.stdout
        assert talk.stderr
        answers = b""
        for line in ("你好\n", "\n  再见"):  # empty lines are skipped
            talk.stdin.write(f"{line}\n".encode())
            talk.stdin.flush()
            answers += talk.stdout.readline()
        talk.stdin.close()
        answers += talk.stdout.read()
        assert (talk.wait(timeout=60), talk.stderr.read()) == (0, b"")
    again = run(model_dir.parent, *flags, stdin="你好\n再见")
    assert again.stdout == answers.decode().replace("\r\n", "\n")
    assert again.stdout.count("\n") >= 2


def test_turns_stay_in_the_conversation_until_reset(model_dir: Path, tmp_path: Path) -> None:
    flags = [model_dir, "--seed", 3, "--max-new-tokens", 8]
    file = tmp_path / "talk.jsonl"
    lines = [
        "你好",
        "长江呢？",
        f"/save {file}",
        "/reset",
        "你好",
        f"/save {file}",
        "/quit",
        "你好",
    ]
    done = run_in_terminal(*flags, "--system", "你是向导", lines="\n".join(lines))
    assert done.exit_code == 0, done.output
    assert done.stderr == f"saved to {file}\n" * 2
    first, second = saved(file)
    assert [message["role"] for message in first] == ["system", *["user", "assistant"] * 2]
    assert [message["content"] for message in first[:2]] == ["你是向导", "你好"]
    assert second == first[:3]  # same seed, same position, same conversation
    answers = [m["content"] for m in first + second if m["role"] == "assistant"]
    assert done.stdout == "".join(f"{answer}\n" for answer in answers)
    # Earlier turns change the next answer.
    alone = run(*flags, "--system", "你是向导", "--temperature", 0, stdin="长江呢？\n")
    after = run(*flags, "--system", "你是向导", "--temperature", 0, stdin="你好\n长江呢？\n")
    assert not after.stdout.endswith(alone.stdout)


def test_system_prompt_can_be_changed_and_removed(model_dir: Path, tmp_path: Path) -> None:
    flags = [model_dir, "--temperature", 0, "--max-new-tokens", 4]
    file = tmp_path / "talk"
    lines = ["/system 你是\x1b诗人", "你好", f"/save {file}", "/system", f"/save {file}.json"]
    done = run_in_terminal(*flags, lines="\n".join(lines))
    assert done.exit_code == 0, done.output
    [with_system] = saved(tmp_path / "talk.jsonl")
    [without] = saved(tmp_path / "talk.json")
    assert with_system[0] == {"role": "system", "content": "你是诗人"}
    assert without == with_system[1:]
    from_flag = run(*flags, "--system", "你是诗人", stdin="你好\n")
    assert from_flag.stdout == done.stdout
    assert run(*flags, stdin="你好\n").stdout != done.stdout


def test_save_appends_a_line(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    file.write_text('{"conversations": [{"role": "assistant", "content": "早"}]}')
    flags = ["--max-new-tokens", 4, "--temperature", 0]
    done = run_in_terminal(model_dir, *flags, lines=f"你好\n/save {file}")
    assert done.exit_code == 0, done.output
    assert [len(messages) for messages in saved(file)] == [1, 2]


def test_a_saved_chat_has_a_name_whose_format_training_recognises(
    model_dir: Path, tmp_path: Path
) -> None:
    lines = f"你好\n/save {tmp_path / 'my.v2'}\n/save {tmp_path / 'talk.txt'}"
    done = run_in_terminal(model_dir, "--max-new-tokens", 4, "--temperature", 0, lines=lines)
    assert done.exit_code == 0, done.output
    assert len(saved(tmp_path / "my.v2.jsonl")) == len(saved(tmp_path / "talk.txt.jsonl")) == 1


def test_oldest_turns_are_left_out_with_one_notice_per_conversation(
    model_dir: Path, tmp_path: Path
) -> None:
    lines = ["长江有多长？它流入哪里？"] * 12
    file = tmp_path / "talk.jsonl"
    # Sampled answers, none of them blank: blank answers are not kept.
    flags = [model_dir, "--temperature", 1, "--top-p", 1, "--seed", 1, "--max-new-tokens", 20]
    flags += ["--system", "你是向导"]
    done = run_in_terminal(*flags, lines="\n".join([*lines, f"/save {file}", "/reset", *lines]))
    assert done.exit_code == 0, done.output
    assert done.stderr.count("oldest turns are left out") == 2  # once per conversation
    [messages] = saved(file)
    assert len(messages) == 25  # the saved conversation is complete


def test_a_longer_context_keeps_the_oldest_turns(model_dir: Path) -> None:
    lines = "\n".join(["长江有多长？它流入哪里？"] * 12)
    flags = [model_dir, "--temperature", 0, "--max-new-tokens", 20]
    for options in ([], ["--rope-scaling", "dynamic"]):
        done = run(*flags, "--context", 2048, *options, stdin=lines)
        assert done.exit_code == 0, done.output
        assert "left out" not in done.stderr
    refused = run(*flags, "--rope-scaling", "linear", stdin=lines)
    assert refused.exit_code == 1
    assert "needs a longer context than the 256 tokens of" in refused.output


def test_a_message_that_is_too_long_is_rejected_with_token_counts(model_dir: Path) -> None:
    done = run(model_dir, "--max-new-tokens", 20, stdin=f"{'长江' * 400}\n你好\n")
    assert (done.exit_code, done.stdout) == (1, "")
    found = re.search(r"the message has ([\d,]+) tokens and at most (\d+) fit", done.stderr)
    assert found
    assert int(found[1].replace(",", "")) >= 400
    assert 200 < int(found[2]) < 256 - 20
    assert len(done.stderr.splitlines()) == 1


def test_invalid_commands_are_reported(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for lines, message in [
        (
            "/rest",
            "/rest is not a command; the commands are /reset, /system TEXT, /save",
        ),
        ("/", "/ is not a command"),
        ("/save", "/save needs a file name"),
        (f"/save {tmp_path / 'talk.jsonl'}", "the conversation is empty"),
        (f"你好\n/save {tmp_path}.d/talk.jsonl", "talk.jsonl: cannot be written: "),
        (f"你好\n/save {tmp_path / 'file' / 'talk.jsonl'}", "cannot be written: "),
        ("你好\n/save ~nobody-of-that-name/talk.jsonl", "the home directory for ~ is unknown"),
    ]:
        # Greedy: a random first token may end the answer, and an empty answer is not kept.
        flags = ["--max-new-tokens", 2, "--temperature", 0]
        done = run_in_terminal(model_dir, *flags, lines=lines)
        assert done.exit_code == 0, "a mistake in typing does not end the conversation"
        [notice] = done.stderr.splitlines()
        assert message in notice
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    # A leading space makes it a message.
    done = run_in_terminal(model_dir, "--max-new-tokens", 2, lines=" /etc 是什么？\n/help")
    assert done.exit_code == 0, done.output
    assert done.stdout.strip()
    assert "/system TEXT  set the system prompt" in done.stderr


def test_each_line_of_a_pipe_is_a_message(model_dir: Path) -> None:
    flags = [model_dir, "--max-new-tokens", 6, "--seed", 1, "--temperature", 0.01]
    lines = ["你好", "/usr/bin 是什么目录？", "/reset", "/quit", "长江有多长？"]
    done = run(*flags, stdin="\n".join(lines))
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    # If the lines were commands, a leading space would change the answers.
    spaced = run(*flags, stdin="\n".join(f" {line}" for line in lines))
    assert spaced.stdout == done.stdout
    assert run(*flags, stdin="\n".join(lines[:2])).stdout != done.stdout


@pytest.mark.parametrize("encoding", ["gbk", "cp1252", "ascii", "utf-16"])
def test_pipes_are_utf_8_whatever_the_locale(encoding: str, model_dir: Path) -> None:
    flags = ["--max-new-tokens", "6", "--temperature", "0"]
    done = subprocess.run(
        [*fast_python(), "-m", "minimind", "chat", model_dir, *flags],
        input="\ufeff你好\r\n长江有多长？\n".encode(),  # as Windows writes it
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    here = run(model_dir, *flags, stdin="你好\n长江有多长？\n")
    assert done.stdout.decode().replace("\r\n", "\n") == here.stdout
    assert not here.stdout.isascii()


def test_invalid_utf_8_is_reported_with_its_line(model_dir: Path) -> None:
    done = run(model_dir, "--max-new-tokens", 2, stdin="你好\n长江\n".encode() + b"ok \xff\n")
    assert done.exit_code == 1
    assert done.stdout.count("\n") >= 2  # the lines before it were answered
    assert done.stderr == (
        "error: standard input, line 3: not utf-8 text; convert it first, "
        "for example with: iconv -f gb18030 -t utf-8\n"
    )


@pytest.mark.parametrize(("encoding", "named"), [("utf-16", "utf-16"), ("gbk", "gb18030")])
def test_the_error_suggests_the_matching_encoding(
    encoding: str, named: str, model_dir: Path
) -> None:
    done = run(model_dir, stdin="你好\n".encode(encoding))
    assert done.exit_code == 1
    assert done.stderr.endswith(f"iconv -f {named} -t utf-8\n")


def test_an_empty_answer_is_not_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_constant_model(tokenizer.im_end, tmp_path / "model", tokenizer)
    done = run(tmp_path, "--temperature", 0, stdin="你好\n再见\n")
    assert (done.exit_code, done.stdout) == (0, "\n\n")
    done = run_in_terminal(tmp_path, "--temperature", 0, lines=f"你好\n/save {tmp_path}/talk")
    assert "the conversation is empty" in done.stderr


def test_incomplete_and_control_characters_are_not_printed(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    half = tokenizer.encode("\U0001f43c")[0]
    assert tokenizer.bytes_of[half] == b"\xf0"
    for word, wanted in [(half, "\ufffd" * 4), (tokenizer.encode("\x07")[0], "")]:
        save_constant_model(word, tmp_path / "model", tokenizer)
        flags = [tmp_path, "--temperature", 0, "--max-new-tokens", 4]
        assert run(*flags, stdin="你好\n").stdout == f"{wanted}\n"


def test_errors_are_one_line(model_dir: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["长江长江"], vocab_size=273)
    wrong = tmp_path / "wrong"
    save_model(wrong, make_model(tokenizer), tokenizer)
    train_tokenizer(["长江长江"], vocab_size=272).save(wrong)
    for arguments, message in [
        ([tmp_path / "nowhere"], "there is no such directory"),
        ([tmp_path], "is not a model directory"),
        ([wrong], "272 tokens, but its model has 273, so they do not match"),
        ([model_dir, "--device", "cuda:99"], "device cuda:99 is not available"),
        ([model_dir, "--temperature", "nan"], "temperature is nan; it must be"),
    ]:
        done = run(*arguments, stdin="你好\n")
        assert (done.exit_code, done.stdout) == (1, ""), arguments
        [error] = done.stderr.splitlines()
        assert error.startswith("error: ")
        assert message in error
    done = run(model_dir, stdin="你好".encode("gb18030"))
    assert (done.exit_code, done.stdout) == (1, "")
    assert "standard input, line 1: not utf-8 text" in done.stderr


def test_sampling_defaults_come_from_the_model(
    model_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def output(directory: Path, **settings: float) -> str:
        named = [(f"--{name.replace('_', '-')}", value) for name, value in settings.items()]
        flags = ["--seed", 3, "--max-new-tokens", 30, *(part for pair in named for part in pair)]
        done = run(directory, *flags, stdin="长江有多长？\n")
        assert done.exit_code == 0, done.output
        return done.stdout

    ours = dict(temperature=0.7, top_p=0.9)
    neutral = dict(temperature=1, top_p=1, top_k=0, min_p=0, repetition_penalty=1)
    assert output(model_dir) == output(model_dir, **ours) != output(model_dir, **neutral)
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    own = dict(temperature=1.3, top_k=9, min_p=0.01, repetition_penalty=1.2)
    (other / "generation_config.json").write_text(json.dumps(own), encoding="utf-8")
    assert output(other) == output(other, **own)
    assert output(other, top_k=0) == output(other, **own | dict(top_k=0))
    (other / "generation_config.json").unlink()
    assert output(other) == output(other, **neutral)


# The command with a controlling terminal, so that Ctrl-C sends SIGINT.
IN_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from minimind.cli.main import main
main()
"""


def test_chat_in_a_terminal(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("termios", reason="pseudo-terminals are POSIX")
    save_model(tmp_path / "model", make_model(tokenizer, context=100_000), tokenizer)
    file = tmp_path / "talk.jsonl"
    ours, theirs = os.openpty()
    settings = {"TERM": "dumb", "INPUTRC": os.devnull, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    flags = ["chat", str(tmp_path), "--temperature=0", "--max-new-tokens=50000"]
    with subprocess.Popen(
        [sys.executable, "-c", IN_TERMINAL, *flags],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env=os.environ | settings,
    ) as talk:
        os.close(theirs)
        shown, decoder = "", codecs.getincrementaldecoder("utf-8")("replace")

        def wait_for(pattern: str) -> str:
            """Read until the pattern appears; return the output before it."""
            nonlocal shown
            silent_seconds = 0
            while not (found := re.search(pattern, shown, re.DOTALL)):
                if select.select([ours], [], [], 1)[0]:
                    shown += decoder.decode(os.read(ours, 65536))
                else:
                    silent_seconds += 1
                    assert silent_seconds < 100, f"no {pattern!r} in {shown[-500:]!r}"
            before, shown = shown[: found.start()], shown[found.end() :]
            return before

        def type_in(text: str) -> None:
            os.write(ours, text.encode())

        def interrupt_prompt() -> None:
            # Python notices a Ctrl-C during the setup of readline only at the next key.
            if sys.platform == "linux":
                main_thread = psutil.Process(talk.pid)
                wait_until(lambda: main_thread.status() == psutil.STATUS_SLEEPING)
            else:  # has no such status
                time.sleep(1)
            type_in("\x03")

        try:
            assert "0.0M parameters, on cpu. /help lists" in wait_for("> $")
            type_in("你好\n")
            wait_for("你好\r\n")
            first = wait_for("(?<=.{30})(?=.)")  # while the answer is still being generated
            type_in("\x03")
            first += wait_for("\r\n> $")
            type_in(f"/save {file}\n")
            wait_for("saved to .*> $")
            [[question, answer]] = saved(file)
            assert question == {"role": "user", "content": "你好"}
            assert first.replace("\r\n", "\n").startswith(answer["content"])
            assert len(tokenizer.encode(answer["content"])) < 50_000
            type_in("/nonsense\n")
            wait_for("/nonsense is not a command; .*> $")
            type_in("half a line")
            wait_for("half a line")
            interrupt_prompt()
            wait_for("Press Ctrl-C again to quit\r\n> $")
            type_in("/help\n")
            wait_for("/reset  .*> $")
            interrupt_prompt()
            wait_for("Press Ctrl-C again to quit\r\n> $")
            interrupt_prompt()
            assert talk.wait(timeout=60) == 0
        finally:
            talk.kill()
            os.close(ours)
    lines = file.read_text("utf-8").splitlines()
    assert [len(json.loads(line)["conversations"]) for line in lines] == [2]
