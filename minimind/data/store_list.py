"""List and remove the token stores of a folder."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from minimind.data.store_manifest import MANIFEST, invalid_records_file
from minimind.errors import ResourceError

_KEY = re.compile(r"[0-9a-f]{24}")


@dataclass(frozen=True)
class StoreSummary:
    """A token store on disk. Of a damaged store only key, size and time are known."""

    key: str
    num_bytes: int
    created: float  # seconds since 1970
    kind: str = "damaged"
    tokens: int = 0
    files: tuple[str, ...] = ()


def list_stores(home: Path) -> list[StoreSummary]:
    """Return the stores in a folder, the newest first. Raises ResourceError if it is unreadable."""
    try:
        folders = [path for path in home.iterdir() if _KEY.fullmatch(path.name) and path.is_dir()]
        summaries = [_summary(folder) for folder in folders]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ResourceError(f"{home}: cannot be read ({error.strerror})") from error
    return sorted(summaries, key=lambda store: (-store.created, store.key))


def _summary(folder: Path) -> StoreSummary:
    fields: dict[str, Any] = {}
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        fields = {
            "kind": manifest["kind"],
            "tokens": manifest["train"]["tokens"] + manifest["validation"]["tokens"],
            "files": tuple(file["path"] for file in manifest["files"]),
        }
    except (OSError, ValueError, KeyError, TypeError):
        pass  # listed as damaged
    size = sum(file.stat().st_size for file in folder.iterdir())
    return StoreSummary(folder.name, size, folder.stat().st_mtime, **fields)


def remove_store(home: Path, key: str) -> bool:
    """Remove a store and its quarantined records; return False if it is being built.

    On Linux and macOS, a run that is reading the store can go on, because its memory maps stay
    valid. Raises ResourceError if the store cannot be removed.
    """
    folder = home / key
    try:
        with FileLock(home / f"{key}.lock", timeout=0):
            # The manifest first: if removal is interrupted, the rest is not a valid store.
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder)
            invalid_records_file(folder).unlink(missing_ok=True)
    except Timeout:
        return False
    except OSError as error:
        raise ResourceError(f"{folder}: cannot be removed ({error.strerror})") from error
    return True
