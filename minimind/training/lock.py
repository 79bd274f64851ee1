"""Claim a run directory: create it, and lock it against other processes."""

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from minimind.errors import ResourceError, TrainingError

_LOCK_FILES = {".lock", ".lock.json"}
_HOLDER_READ_RETRIES = 25
_RETRY_S = 0.02


@contextlib.contextmanager
def claim_directory(run: Path) -> Iterator[None]:
    """Create a run directory and hold its lock; if the block adds no file, remove both again.

    A run that is refused therefore leaves nothing behind. Raises the errors of `run_lock`, and
    ResourceError if the directory cannot be created.
    """
    missing = [folder for folder in (run, *run.parents) if not folder.exists()]  # innermost first
    had_lock = (run / ".lock").exists()
    try:
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(
                f"{run}: cannot be created ({error.strerror}); choose another --out"
            ) from error
        with run_lock(run):
            before = _file_names(run)
            try:
                yield
            finally:
                if not had_lock and _file_names(run) == before:
                    # Under the lock: later, it could be that of another process. Windows cannot
                    # remove an open file, and filelock removes it there.
                    with contextlib.suppress(OSError):
                        (run / ".lock").unlink()
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # not empty, or never created
                folder.rmdir()


def _file_names(run: Path) -> set[str]:
    return {path.name for path in run.iterdir()} - _LOCK_FILES


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the lock of a run directory. The operating system releases it if the process dies.

    Raises TrainingError, which names the holder, if another process has the lock, and
    ResourceError if the directory cannot be written.
    """
    lock, holder_file = FileLock(run / ".lock", timeout=0), run / ".lock.json"
    try:
        lock.acquire()
    except Timeout:
        raise TrainingError(
            f"{run} is in use by {_describe_holder(holder_file)}; wait for it, stop it, or "
            "choose another --out"
        ) from None
    except OSError as error:
        raise ResourceError(
            f"{run}: cannot be written ({error.strerror}); choose another --out"
        ) from error
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
