"""Count the files that Python opens below a folder, with an audit hook."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_folder: Path | None = None
_opened = 0


def _count(event: str, arguments: tuple[Any, ...]) -> None:
    global _opened
    if event == "open" and _folder and str(arguments[0]).startswith(str(_folder)):
        _opened += 1


sys.addaudithook(_count)


def opens(act: Callable[[], object], folder: Path) -> int:
    """Return the number of files below `folder` that are opened while `act` runs."""
    global _folder, _opened
    _folder, _opened = folder, 0
    try:
        act()
    finally:
        _folder = None
    return _opened
