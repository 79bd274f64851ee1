"""User folders: cache, data, and paths that begin with `~`."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from platformdirs import user_cache_path, user_data_path

from minimind.errors import UsageError

CACHE_VARIABLE = "MINIMIND_CACHE"


def cache_folder() -> Path:
    """Return the cache folder: `$MINIMIND_CACHE`, or the one of the operating system.

    Raises UsageError if the user has no home directory.
    """
    if folder := os.environ.get(CACHE_VARIABLE):
        return expand_user(folder)
    return _user_folder(user_cache_path, CACHE_VARIABLE)


def data_folder() -> Path:
    """Return the folder for data of the user, such as saved conversations.

    Raises UsageError if the user has no home directory.
    """
    return _user_folder(user_data_path, "XDG_DATA_HOME")


def _user_folder(find: Callable[..., Path], variable: str) -> Path:
    with contextlib.suppress(RuntimeError):  # newer platformdirs raise it; older ones return ~/…
        folder = find("minimind", appauthor=False)
        if folder.is_absolute():
            return folder
    raise UsageError(
        f"this user has no home directory; set the environment variable {variable} to a folder "
        "that minimind may write to"
    )


def expand_user(path: str | Path) -> Path:
    """Return `path` with a leading `~` or `~name` replaced by that user's home directory.

    Raises UsageError if that home directory is unknown.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(
            f"{path}: the home directory for ~ is unknown; write the path without ~, or set HOME"
        ) from None
