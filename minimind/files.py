"""Atomic, durable file writes, and JSON files.

A file is written under a temporary name, flushed to disk, then renamed. So the old or the new file
is there at any time, never a partial one, also after a power failure.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    if path.is_dir() and os.name == "nt":  # Windows flushes directory entries by itself
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_file(path: Path, *, mode: int = 0o666) -> Iterator[Path]:
    """Yield an empty temporary file; at the end of the `with` block it replaces `path`.

    mode: permissions of the new file, before the umask. If `path` is a symbolic link, the file it
    points to is replaced. After an error `path` is unchanged and the temporary file is removed.
    """
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a UTF-8 text file atomically. Creates missing parent directories.

    Lone surrogates, which UTF-8 cannot encode, become "?". A device or a pipe, such as /dev/stdout,
    is written to directly.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        path.write_bytes(text.encode("utf-8", "replace"))
        return
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace", newline="\n")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically, with non-ASCII characters unescaped."""
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


class TextFile(Protocol):
    """A path, or a URL that can be read like one."""

    def read_text(self, encoding: str) -> str: ...


def read_json(path: TextFile) -> Any:
    """Return the content of a JSON file. Raises OSError, and ValueError if it is not JSON."""
    return json.loads(path.read_text("utf-8"))


def read_json_object(path: TextFile) -> dict[str, Any]:
    """Return the object in a JSON file. Raises as `read_json`, and ValueError for other values."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content
