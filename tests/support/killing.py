"""Kill a command while it writes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def kill_amid(arguments: list[str], cwd: Path, results: Path, num_bytes: int) -> list[bytes]:
    """SIGKILL `minimind` once `results` has this many bytes; return its complete lines."""
    child = subprocess.Popen(
        [sys.executable, "-m", "minimind", *arguments],
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        env=os.environ,
    )
    try:
        while not results.is_file() or results.stat().st_size < num_bytes:
            assert child.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    content = results.read_bytes()
    return content[: content.rfind(b"\n") + 1].splitlines()
