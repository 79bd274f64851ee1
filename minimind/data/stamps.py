"""SHA-256 of files, and stamps (size, times, inode) that show if a file must be hashed again."""

import hashlib
import os
import time
from typing import Any

from minimind.data.locations import Location, UrlPath
from minimind.errors import DataError

_SETTLED_NS = 2_000_000_000  # minimum age of a file at which a write surely changes its times


def sha256_of(file: Location) -> str:
    """Return the SHA-256 of a file. Raises DataError when it cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def stamp_of(file: Location) -> list[Any]:
    """Return [size, modification time, change time, inode]: a write changes at least one.

    Of a URL it is [size, version], where the version is None if the server names none.
    """
    if isinstance(file, UrlPath):
        return list(file.stat())
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def settled_stamp_of(file: Location) -> list[Any] | None:
    """Return the stamp of a file that was just hashed; None if a write might not change it.

    Two writes within the resolution of the clock have the same times. Windows has no change time,
    only a creation time.
    """
    stamp = stamp_of(file)
    if isinstance(file, UrlPath):
        return stamp if stamp[1] is not None else None
    settled = time.time_ns() - max(stamp[1:3]) > _SETTLED_NS
    return stamp if settled and os.name != "nt" else None
