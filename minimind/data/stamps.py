"""File contents by SHA-256, and the times that tell when a file has to be hashed again."""

import hashlib
import os
import time
from pathlib import Path

from minimind.errors import DataError

_SETTLED_NS = 2_000_000_000  # age after which a write would show in a file's times


def sha256_of(file: Path) -> str:
    """Return the hash of a file's contents. Raises DataError when it cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def stamp_of(file: Path) -> list[int]:
    """Return what any write to a file changes: size, modification time, change time, inode."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def settled_stamp_of(file: Path) -> list[int] | None:
    """Return the stamp of a file that was just hashed, or None if a later write may leave it.

    A write within the resolution of the clock leaves the same times. On Windows the change time is
    that of creation.
    """
    stamp = stamp_of(file)
    settled = time.time_ns() - max(stamp[1:3]) > _SETTLED_NS
    return stamp if settled and os.name != "nt" else None
