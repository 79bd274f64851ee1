"""`minimind chat --url`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minimind.tokenizer import Tokenizer
from tests.support.commands import fast_python
from tests.support.services import save_models, serving

# Run the command, then report what it has imported of torch; its compiler takes over a second.
REPORT_TORCH = """
import atexit, sys
slow = {"torch", "torch._dynamo"}
atexit.register(lambda: print(slow & sys.modules.keys(), file=sys.stderr))
from minimind.cli.main import main
main()
"""


def chat(
    *flags: str, stdin: str, key: str = "secret", imports: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `minimind chat`; imports: in a new process, which reports its imports of torch."""
    python = [sys.executable, "-c", REPORT_TORCH] if imports else [*fast_python(), "-m", "minimind"]
    return subprocess.run(
        [*python, "chat", *flags],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"MINIMIND_API_KEY": key, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
    )


def test_remote_answers_equal_local_ones_and_need_no_torch(process: Any, models_dir: Path) -> None:
    settings = ["--temperature", "0", "--max-new-tokens", "8", "--system", "你是向导"]
    lines = "你好\n长江呢？\n"
    remote = chat("tiny", "--url", process.url, *settings, stdin=lines, imports=True)
    assert (remote.returncode, remote.stderr) == (0, "set()\n")
    local = chat(str(models_dir / "tiny"), *settings, stdin=lines, imports=True)
    assert (local.stdout, local.stderr) == (remote.stdout, "{'torch'}\n")
    assert remote.stdout.count("\n") >= 2
    first = chat("--url", process.url, *settings, stdin=lines)  # without a name, the first
    other = chat("other", "--url", process.url, *settings, stdin=lines)
    assert first.stdout == other.stdout != remote.stdout


def test_a_conversation_may_exceed_the_context(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The model has a short context: filling that of the shared service would take minutes."""
    models = save_models(tmp_path / "models", tokenizer, context=256)
    lines = ("长江" * 50 + "\n") * 6
    with serving(models, tmp_path / "log", MINIMIND_API_KEY="secret") as service:
        done = chat("tiny", "--url", service.url, "--max-new-tokens", "3", stdin=lines)
    assert done.returncode == 0
    assert done.stderr.count("oldest turns are left out") == 1


@pytest.mark.parametrize(
    ("flags", "key", "message"),
    [
        ([], "", "give a MODEL, or a service with --url URL"),
        (["tiny", "--url", "URL", "--device", "cpu"], "secret", "cannot be used with --url"),
        (["tiny", "--url", "URL", "--adapter", "a"], "secret", "cannot be used with --url"),
        (["--url", "URL", "--rope-scaling", "yarn"], "secret", "cannot be used with --url"),
        (["nobody", "--url", "URL"], "secret", "has no model nobody; it has: other, tiny"),
        (
            ["--url", "URL"],
            "wrong",
            "API key; set the environment variable MINIMIND_API_KEY",
        ),
        (["--url", "http://127.0.0.1:9"], "", "cannot be reached"),
        (["--url", "ftp://a"], "", "is not the URL of a service"),
    ],
)
def test_errors_are_reported(process: Any, flags: list[str], key: str, message: str) -> None:
    done = chat(
        *[process.url if flag == "URL" else flag for flag in flags], stdin="你好\n", key=key
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
