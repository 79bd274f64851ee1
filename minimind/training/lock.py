"""One process a run directory."""

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from minimind.errors import TrainingError


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold `run` for this process; the system lets go of it if the process dies.

    Raises TrainingError, with who holds it, when another process does.
    """
    lock, holder = FileLock(run / ".lock", timeout=0), run / ".lock.json"
    try:
        lock.acquire()
    except Timeout:
        raise TrainingError(
            f"{run} is in use by {_told(holder)}; wait for it, stop it, or choose another --out"
        ) from None
    try:
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        who = {"pid": os.getpid(), "machine": platform.node(), "since": since}
        holder.write_text(json.dumps(who), encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _told(holder: Path) -> str:
    try:
        who = json.loads(holder.read_text("utf-8"))
        return f"process {who['pid']} on {who['machine']} since {who['since']}"
    except (OSError, ValueError, KeyError):  # it is only just beginning, or ending
        return "another process"
