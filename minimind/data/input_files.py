"""Input files: the files of a path, folder, glob or dataset name, and their formats."""

import difflib
import fnmatch
import glob
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from minimind.data.locations import Location, is_url, list_urls, location
from minimind.data.registry import downloaded_file, is_name, registry
from minimind.errors import DataError
from minimind.paths import expand_user

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2", ".zip": "zip"}
_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
SUPPORTED = f"supported are {' '.join(_FORMATS)}, each also with {' '.join(COMPRESSIONS)}"


def format_of(path: Location) -> str | None:
    """Return the file format by the name, such as ".jsonl"; None if it is not supported."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _FORMATS else None


def list_files(path: str) -> list[Path]:
    """List the files of `path`: a file, all supported files below a folder, a glob, or a dataset.

    A name that exists is taken literally: if the folder `[v1]` exists, `[v1]/*.jsonl` matches the
    files in it. Below a folder, links are followed and hidden files are skipped. Otherwise the name
    of a published dataset stands for its downloaded file. Raises DataError when there is no file.
    """
    if is_url(path):
        raise DataError(
            f"{path}: a URL is read only by `minimind data prepare`; download the files first"
        )
    if is_name(path):
        return [downloaded_file(path)]
    root = expand_user(path)
    try:
        if root.is_file():
            return [root]
        if root.is_dir():
            candidates = list(walk_files(root))
        elif glob.has_magic(str(root)):
            candidates = _expand_glob(root)
        else:
            raise DataError(f"{path}: there is no such file or folder{_suggestion(path, root)}")
        files = sorted(p for p in candidates if format_of(p) is not None and p.is_file())
    except PermissionError as error:
        raise DataError(f"{error.filename or path}: no permission to read it") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if files:
        return files
    if root.is_dir():
        raise DataError(f"{path}: the folder has no files of a supported format; {SUPPORTED}")
    if candidates:
        raise DataError(
            f"{path}: none of the {len(candidates):,} files has a supported format; {SUPPORTED}"
        )
    raise DataError(f"{path}: no file matches{_separation_hint(path)}")


def would_match(path: str, file: Path) -> bool:
    """Return True if `path` would include `file`, which need not exist, among its files.

    file: absolute, without symbolic links.
    """
    root = expand_user(path)
    resolved = Path(os.path.realpath(root))
    below = ("**",) if root.is_dir() else ()
    return _matches(file.parts, (*resolved.parts, *below))


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Return True if the parts of a path match those of a glob, of which "**" matches several."""
    if not names or not patterns:
        return not names and all(pattern == "**" for pattern in patterns)
    (name, *other_names), (pattern, *other_patterns) = names, patterns
    if name == pattern:
        return _matches(other_names, other_patterns)
    if name.startswith(".") and not pattern.startswith("."):
        return False
    if pattern == "**":
        return _matches(names, other_patterns) or _matches(other_names, patterns)
    return fnmatch.fnmatchcase(name, pattern) and _matches(other_names, other_patterns)


def list_locations(path: str) -> list[Location]:
    """List the files of `path` as `list_files` does; `path` may also be a URL.

    Raises UsageError and ResourceError as `UrlPath`.
    """
    if not is_url(path):
        return [*list_files(path)]
    where = location(path)
    if isinstance(where, Path):  # file://
        return [*list_files(str(where))]
    try:
        files = [file for file in list_urls(path) if format_of(file) is not None or file == where]
    except FileNotFoundError as error:  # such as a missing bucket
        raise DataError(f"{path}: {error}; check the address") from None
    if not files:
        raise DataError(f"{path}: there is no such file, and no file below it; {SUPPORTED}")
    return [*files]


def _expand_glob(pattern: Path) -> list[Path]:
    """Expand a glob. Parts of it that exist as file names are taken literally."""
    matches = [Path(pattern.anchor)]
    for part in pattern.relative_to(pattern.anchor).parts:
        following: list[Path] = []
        for folder in matches:
            if (folder / part).exists():
                following.append(folder / part)
            elif glob.has_magic(part):
                inside = os.path.join(glob.escape(str(folder)), part)
                following += map(Path, glob.glob(inside, recursive=True))
        matches = list(dict.fromkeys(following))
    return matches


def walk_files(folder: Path) -> Iterator[Path]:
    """Yield all files below `folder` that are not hidden, also those in linked folders.

    Each folder counts once, under its own name if it has one below `folder`, so links cannot form
    a loop. Raises OSError for a folder that cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise error

    visited = set[tuple[int, int]]()
    starts = [folder]
    for start in starts:
        links: list[Path] = []
        if _identity(start) in visited:
            continue
        for parent, folders, names in os.walk(start, onerror=fail):
            visited.add(_identity(Path(parent)))
            shown = [Path(parent, name) for name in folders if not name.startswith(".")]
            links += filter(Path.is_symlink, shown)  # os.walk does not enter them
            folders[:] = [path.name for path in shown if _identity(path) not in visited]
            yield from (Path(parent, name) for name in names if not name.startswith("."))
        starts += sorted(links)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _suggestion(path: str, missing: Path) -> str:
    """Return a hint about similar names that exist."""
    if hint := _separation_hint(path):
        return hint
    folder = next((p for p in missing.parents if p.is_dir()), None)
    if folder is None:  # a drive or a network share that is not there
        return ""
    name = missing.relative_to(folder).parts[0]
    names = [p.name for p in folder.iterdir()]
    if similar := difflib.get_close_matches(name, names, n=3):
        return f"; {folder} contains {', '.join(similar)}"
    set_name, colon, file_name = path.partition(":")
    if similar := difflib.get_close_matches(set_name, registry(), n=1):
        return f", and no such dataset; did you mean {similar[0]}{colon}{file_name}?"
    return f"; the folder {folder} exists, but contains no {name}"


def _separation_hint(path: str) -> str:
    """Return a hint if `path` is several paths, separated by commas or spaces."""
    parts = [part for part in re.split(r"[,，;\s]+", path) if part]
    if len(parts) < 2 or not any(map(os.path.exists, parts)):
        return ""
    options = " ".join(f"--data {shlex.quote(part)}" for part in parts)
    return f". Give each path separately: repeat --data ({options}), or separate them by spaces"
