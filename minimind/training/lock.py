"""One process a run directory."""

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

_LOOKS = 25  # at who holds a lock, a fiftieth of a second apart


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
    for _ in range(_LOOKS):  # it may only just be beginning, with the note of one that was killed
        try:
            who = json.loads(holder.read_text("utf-8"))
            if who["machine"] != platform.node() or _is_alive(who["pid"]):
                return f"process {who['pid']} on {who['machine']} since {who['since']}"
        except (OSError, ValueError, KeyError):
            pass
        time.sleep(0.02)
    return "another process"


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # where asking is killing
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        pass
    return True
