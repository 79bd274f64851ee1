"""`minimind chat --url`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minimind.tokenizer import Tokenizer
from tests.support.services import save_models, serving

# The command, which then tells what it has imported.
TOLD = """
import atexit, sys
atexit.register(lambda: print("torch" in sys.modules, file=sys.stderr))
from minimind.cli.main import main
main()
"""


def chat(*flags: str, stdin: str, key: str = "secret") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", TOLD, "chat", *flags],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"MINIMIND_API_KEY": key, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
    )


def test_it_answers_as_the_model_does_here_and_needs_no_torch(
    process: Any, models_dir: Path
) -> None:
    settings = ["--temperature", "0", "--max-new-tokens", "8", "--system", "你是向导"]
    lines = "你好\n长江呢？\n"
    there = chat("tiny", "--url", process.url, *settings, stdin=lines)
    assert (there.returncode, there.stderr) == (0, "False\n")
    here = chat(str(models_dir / "tiny"), *settings, stdin=lines)
    assert here.stdout == there.stdout
    assert there.stdout.count("\n") >= 2
    first = chat("--url", process.url, *settings, stdin=lines)  # without a name, the first
    other = chat("other", "--url", process.url, *settings, stdin=lines)
    assert first.stdout == other.stdout != there.stdout


def test_a_talk_may_be_longer_than_the_context(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """With a context of its own: to fill that of the other services takes minutes on busy cores."""
    models = save_models(tmp_path / "models", tokenizer, context=256)
    lines = ("长江" * 50 + "\n") * 6
    with serving(models, tmp_path / "log", MINIMIND_API_KEY="secret") as service:
        done = chat("tiny", "--url", service.url, "--max-new-tokens", "3", stdin=lines)
    assert done.returncode == 0
    assert done.stderr.count("oldest turns are left out") == 1


@pytest.mark.parametrize(
    ("flags", "key", "message"),
    [
        ([], "", "give a MODEL, or the --url of a service"),
        (["tiny", "--url", "URL", "--device", "cpu"], "secret", "the service's to choose"),
        (["tiny", "--url", "URL", "--adapter", "a"], "secret", "the service's to choose"),
        (["nobody", "--url", "URL"], "secret", "has no model nobody; it has: other, tiny"),
        (["--url", "URL"], "wrong", "wants a key; set it in the variable MINIMIND_API_KEY"),
        (["--url", "http://127.0.0.1:9"], "", "cannot be reached"),
        (["--url", "ftp://a"], "", "is not the URL of a service"),
    ],
)
def test_what_is_wrong_is_told(process: Any, flags: list[str], key: str, message: str) -> None:
    done = chat(
        *[process.url if flag == "URL" else flag for flag in flags], stdin="你好\n", key=key
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
