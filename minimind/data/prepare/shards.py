"""Files of the stages: shards of texts (JSON Lines, zstd), and arrays. All writes are atomic."""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import zstandard
from numpy.typing import NDArray

from minimind.data.stamps import sha256_of
from minimind.errors import DataError
from minimind.files import atomic_file

WORK_LEVEL, OUTPUT_LEVEL = 1, 6  # zstd: files that are soon deleted, and files that stay
BATCH_CHARACTERS = 1 << 18
_BATCH_DOCUMENTS = 1 << 14


class FileEntry(TypedDict):
    """A file of the manifest."""

    name: str
    bytes: int
    sha256: str


def file_entry(path: Path) -> FileEntry:
    """Return the manifest entry of a file that was just written."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


@dataclass
class TextWriter:
    """Writes texts, one JSON object per line, and counts them."""

    stream: Any
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
def write_texts(path: Path, level: int) -> Iterator[TextWriter]:
    """Write a shard of texts; it appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
    with (
        atomic_file(path) as temporary,
        temporary.open("wb") as raw,
        compressor.stream_writer(raw) as stream,
    ):
        yield TextWriter(stream)


def read_shard(path: Path) -> Iterator[str]:
    """Yield the texts of a shard. Raises DataError if it is missing or damaged."""
    try:
        with path.open("rb") as raw:
            stream = zstandard.ZstdDecompressor().stream_reader(raw)
            for line in io.TextIOWrapper(stream, "utf-8", newline="\n"):
                yield json.loads(line)["text"]
    except (OSError, zstandard.ZstdError, ValueError, KeyError) as error:
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


def write_array(path: Path, array: NDArray[Any]) -> FileEntry:
    """Write a .npy file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)
    return file_entry(path)


def read_array(path: Path) -> NDArray[Any]:
    """Map a .npy file into memory. Raises DataError if it is missing or damaged."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
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
