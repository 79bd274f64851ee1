"""The token stores in a folder: what each holds, and how one is removed."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from minimind.errors import ResourceError

_KEY = re.compile(r"[0-9a-f]{24}")


@dataclass(frozen=True)
class StoreSummary:
    """One store on disk. Of a damaged one only key, time and size are known."""

    key: str
    num_bytes: int
    made: float  # seconds since 1970
    kind: str = "damaged"
    tokens: int = 0
    files: tuple[str, ...] = ()


def list_stores(home: Path) -> list[StoreSummary]:
    """Return the stores in a folder, the newest first. Raises ResourceError if it is unreadable."""
    try:
        places = [path for path in home.iterdir() if _KEY.fullmatch(path.name) and path.is_dir()]
        found = [_summary(place) for place in places]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ResourceError(f"{home}: cannot be read ({error.strerror})") from error
    return sorted(found, key=lambda store: (-store.made, store.key))


def _summary(place: Path) -> StoreSummary:
    known: dict[str, Any] = {}
    try:
        manifest = json.loads((place / "manifest.json").read_text("utf-8"))
        known = {
            "kind": manifest["kind"],
            "tokens": manifest["train"]["tokens"] + manifest["validation"]["tokens"],
            "files": tuple(file["path"] for file in manifest["files"]),
        }
    except (OSError, ValueError, KeyError, TypeError):
        pass  # it is listed as damaged
    size = sum(file.stat().st_size for file in place.iterdir())
    return StoreSummary(place.name, size, place.stat().st_mtime, **known)


def remove_store(home: Path, key: str) -> bool:
    """Remove a store and the list of its invalid lines; return False if it is being made now.

    A run that reads it keeps its memory maps on Linux and macOS. Raises ResourceError.
    """
    place = home / key
    try:
        with FileLock(home / f"{key}.lock", timeout=0):
            (place / "manifest.json").unlink(missing_ok=True)  # first: what is left is no store
            shutil.rmtree(place)
            (home / f"{key}.bad-lines.jsonl").unlink(missing_ok=True)
    except Timeout:
        return False
    except OSError as error:
        raise ResourceError(f"{place}: cannot be removed ({error.strerror})") from error
    return True
