"""Progress within a long task, from the process or machine where it runs to the main process.

The task writes the bytes that it has read to a file next to its output, and the main process reads
it now and then. So this works in the same way in a pool, in a Ray cluster and with URLs.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator

from minimind.data.locations import Location, write_json
from minimind.errors import MinimindError
from minimind.files import read_json_object

INTERVAL_S = 2.0  # between two writes, and between two reads


def progress_file(folder: Location, number: int) -> Location:
    """Return the file for the progress of a task of the stage in `folder`."""
    return folder / f"{number:05}.progress"


class ProgressFile:
    """Counts bytes, and writes their number from time to time."""

    def __init__(self, path: Location) -> None:
        self._path, self._done, self._written_at = path, 0, time.monotonic()

    def add(self, num_bytes: int) -> None:
        """Count bytes that were read."""
        self._done += num_bytes
        if time.monotonic() - self._written_at >= INTERVAL_S:
            # Only the progress depends on it: the disk may be full, or the file open elsewhere.
            with contextlib.suppress(OSError, MinimindError):
                write_json(self._path, {"bytes": self._done})
            self._written_at = time.monotonic()


def running_tasks(folder: Location, unfinished: Collection[str]) -> dict[str, int]:
    """Return the bytes that each unfinished task of a stage has read, if it has written them.

    Errors are ignored: the next reading comes soon.
    """
    running = {}
    with contextlib.suppress(OSError, ValueError, KeyError, MinimindError):
        for path in folder.glob("*.progress"):
            if path.stem in unfinished:
                running[path.stem] = int(read_json_object(path)["bytes"])
    return running


@contextlib.contextmanager
def repeatedly(action: Callable[[], None]) -> Iterator[None]:
    """Call `action` in a thread from time to time, until the end of the `with` block."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.wait(INTERVAL_S):
            action()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
