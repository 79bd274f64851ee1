import errno
import shlex
import sys
from pathlib import Path

import pytest

from minimind.errors import install_line, same_command, shell_words, unwritable


@pytest.mark.skipif(sys.platform == "win32", reason="another shell")
@pytest.mark.parametrize(
    "name",
    [
        "out/我的 模型[1]",
        "it's",
        "$HOME",
        "a;b",
        "`c`",
        "a\nb",
        "~x",
        "*",
        "!!",
        "#a",
        "-x",
        "",
        "plain/a-b_c.d",
    ],
)
def test_shell_words_round_trip(name: str) -> None:
    arguments = shlex.split(f"minimind {shell_words('chat', Path('folder') / name)}")
    assert arguments == ["minimind", "chat", str(Path("folder") / name)]


def test_simple_names_are_not_quoted_and_dashes_are_escaped() -> None:
    assert shell_words("chat", Path("out/demo")) == "chat out/demo"
    assert shell_words("chat", Path("-x"), "--adapter", Path("--y")) == "chat ./-x --adapter ./--y"


def test_unwritable_outputs_have_advice_that_fits(tmp_path: Path) -> None:
    out = Path("x.gguf")
    full = OSError(errno.ENOSPC, "No space left on device", "x.gguf")
    start = "x.gguf: cannot be written: "
    assert str(unwritable(out, full)) == (
        f"{start}No space left on device; free some disk space, or choose another --out"
    )
    read_only = OSError(errno.EROFS, "Read-only file system", "x.gguf")
    assert str(unwritable(out, read_only)) == f"{start}Read-only file system; choose another --out"
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(OSError) as caught:
            path.mkdir()
        assert str(unwritable(out, caught.value)) == (
            f"{start}{tmp_path / 'file'} is a file, not a folder; choose another --out"
        )


def test_windows_quoting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    assert shell_words("chat", Path("我的 模型[1]")) == 'chat "我的 模型[1]"'


def test_install_line_for_checkout_and_wheel(tmp_path: Path) -> None:
    assert install_line("wandb") == 'pip install -c constraints.txt -e ".[wandb]"'
    wheel = tmp_path / "site-packages" / "minimind"
    assert install_line("wandb", wheel) == 'pip install "minimind[wandb]"'


def test_the_command_to_repeat_is_named_without_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["minimind", "sft"])
    assert same_command() == "the same command"
    monkeypatch.setattr(sys, "argv", ["minimind", "sft", "--fresh"])
    assert same_command() == "the same command without --fresh"
