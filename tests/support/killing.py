"""Kill a command while it writes."""

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tests.support.commands import PID_FILE, fast_python, pid_of


def kill_amid(arguments: list[str], cwd: Path, results: Path, num_bytes: int) -> list[bytes]:
    """SIGKILL `minimind` once `results` has this many bytes; return its complete lines."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pid"
        child = subprocess.Popen(
            [*fast_python(), "-m", "minimind", *arguments],
            cwd=cwd,
            stdout=subprocess.DEVNULL,
            env=os.environ | {PID_FILE: str(file)},
        )
        try:
            while not results.is_file() or results.stat().st_size < num_bytes:
                assert child.poll() is None, "it ended before it could be killed"
                time.sleep(0.01)
            os.kill(pid_of(child, file), signal.SIGKILL)
            child.wait()
        finally:
            child.kill()
    content = results.read_bytes()
    return content[: content.rfind(b"\n") + 1].splitlines()
