"""A file lock that lets only one process write to a run directory."""

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from minimind.errors import TrainingError

_HOLDER_READ_RETRIES = 25
_RETRY_S = 0.02


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the lock of a run directory. The operating system releases it if the process dies.

    Raises TrainingError, which names the holder, if another process has the lock.
    """
    lock, holder_file = FileLock(run / ".lock", timeout=0), run / ".lock.json"
    try:
        lock.acquire()
    except Timeout:
        raise TrainingError(
            f"{run} is in use by {_describe_holder(holder_file)}; wait for it, stop it, or "
            "choose another --out"
        ) from None
    try:
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "machine": platform.node(), "since": since}
        holder_file.write_text(json.dumps(holder), encoding="utf-8")
        yield
    finally:
        holder_file.unlink(missing_ok=True)
        lock.release()


def _describe_holder(holder_file: Path) -> str:
    """Describe the process that holds the lock.

    The holder locks first and writes this file a moment later. Until then the file is missing or
    that of a process that was killed, so reading is retried.
    """
    for _ in range(_HOLDER_READ_RETRIES):
        try:
            holder = json.loads(holder_file.read_text("utf-8"))
            if holder["machine"] != platform.node() or _is_alive(holder["pid"]):
                return f"process {holder['pid']} on {holder['machine']} since {holder['since']}"
        except (OSError, ValueError, KeyError):
            pass
        time.sleep(_RETRY_S)
    return "another process"


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # os.kill with signal 0 would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # a process of another user
        pass
    return True
