"""Files of the stages: shards of texts (JSON Lines, zstd), and arrays. All writes are atomic."""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import zstandard
from numpy.typing import NDArray

from minimind.data.compression import open_zstd
from minimind.data.locations import Location, new_file
from minimind.data.stamps import sha256_of
from minimind.errors import DataError

WORK_LEVEL, OUTPUT_LEVEL = 1, 6  # zstd: files that are soon deleted, and files that stay
BATCH_CHARACTERS = 1 << 18
_BATCH_DOCUMENTS = 1 << 14
_HEADER_BYTES = 128  # of a .npy file with one or two dimensions


class FileEntry(TypedDict):
    """A file of the manifest."""

    name: str
    bytes: int
    sha256: str


def _entry(name: str, written: Path) -> FileEntry:
    """Return the manifest entry of a file that was just written under a temporary name."""
    return {"name": name, "bytes": written.stat().st_size, "sha256": sha256_of(written)}


@dataclass
class TextWriter:
    """Writes texts, one JSON object per line, and counts them. entry: of the complete file."""

    stream: Any
    entry: FileEntry = field(default_factory=lambda: FileEntry(name="", bytes=0, sha256=""))
    documents: int = 0
    characters: int = 0
    bytes: int = 0

    def write(self, text: str) -> None:
        """Append a text."""
        line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
        self.stream.write(line)
        self.documents += 1
        self.characters += len(text)
        self.bytes += len(text.encode())


@contextlib.contextmanager
def write_texts(path: Location, level: int) -> Iterator[TextWriter]:
    """Write a shard of texts; it appears when it is complete."""
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
    with new_file(path) as temporary:
        with temporary.open("wb") as raw, compressor.stream_writer(raw) as stream:
            writer = TextWriter(stream)
            yield writer
        writer.entry = _entry(path.name, temporary)


def read_shard(path: Location) -> Iterator[str]:
    """Yield the texts of a shard. Raises DataError if it is missing or damaged."""
    try:
        with path.open("rb") as raw:
            for line in io.TextIOWrapper(open_zstd(raw), "utf-8", newline="\n"):
                yield json.loads(line)["text"]
    except (OSError, EOFError, zstandard.ZstdError, ValueError, KeyError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); it was changed or removed during the preparation. "
            "Remove the output folder and start again"
        ) from error


def text_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group texts into batches, bounded in characters and in number."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_array(path: Location, array: NDArray[Any]) -> FileEntry:
    """Write a .npy file."""
    with new_file(path) as temporary:
        with temporary.open("wb") as stream:
            np.save(stream, array, allow_pickle=False)
        return _entry(path.name, temporary)


def read_array(path: Location) -> NDArray[Any]:
    """Map a .npy file into memory, or read that of a URL.

    Raises DataError if it is missing or damaged.
    """
    with _readable(path):
        if isinstance(path, Path):
            return np.load(path, mmap_mode="r", allow_pickle=False)
        array: NDArray[Any] = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        return array


def read_elements(
    path: Location, row: int = 0, start: int = 0, count: int | None = None
) -> NDArray[Any]:
    """Return `count` elements, or all, from `start` of a row of a .npy file.

    An array of one dimension is one row. Of a URL only these bytes are requested. Raises DataError
    as `read_array`.
    """
    if isinstance(path, Path):
        return np.atleast_2d(read_array(path))[row, start:][:count]
    with _readable(path):
        header = io.BytesIO(path.read_bytes(0, _HEADER_BYTES))
        np.lib.format.read_magic(header)
        shape, _, dtype = np.lib.format.read_array_header_1_0(header)
        first = row * shape[-1] + start
        last = first + (shape[-1] - start if count is None else count)
        offset, width = header.tell(), dtype.itemsize
        content = path.read_bytes(offset + first * width, offset + last * width)
        return np.frombuffer(content, dtype)


@contextlib.contextmanager
def _readable(path: Location) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); it was changed or removed during the preparation. "
            "Remove the output folder and start again"
        ) from error


def content_key(text: str) -> int:
    """Return a 64-bit hash of a text, which decides if it is a sample."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


@dataclass
class Samples:
    """The texts with the smallest hashes, for each reason: a sample that no order affects."""

    size: int
    excerpt: Callable[[str], str]
    by_reason: dict[str, list[tuple[int, str]]]

    def add(self, reason: str, text: str) -> None:
        """Consider a text for the sample of a reason."""
        kept = self.by_reason.setdefault(reason, [])
        key = content_key(text)
        if len(kept) < self.size or key < kept[-1][0]:
            kept.append((key, self.excerpt(text)))
            kept.sort()
            del kept[self.size :]

    def merge(self, other: dict[str, list[Any]]) -> None:
        """Add the samples of another part of the data."""
        for reason, entries in other.items():
            kept = self.by_reason.setdefault(reason, [])
            kept += [(key, text) for key, text in entries]
            kept.sort()
            del kept[self.size :]
