"""Check that the disk has room for a preparation, before hours of work.

At its largest, the output folder holds the shards of two stages and, besides, either the keys of
all documents or the token store. All shards are about as large as the text compressed by zstd. The
estimate takes size and compression from a sample of the input and assumes that nothing is dropped.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import zstandard

from minimind.data.input_files import COMPRESSIONS
from minimind.data.invalid import InvalidRecords
from minimind.data.locations import Location
from minimind.data.prepare.settings import PrepareSettings
from minimind.data.prepare.shards import WORK_LEVEL
from minimind.data.read import read_records
from minimind.errors import ResourceError
from minimind.tokenizer import Tokenizer
from minimind.units import format_size

_MAX_FILES = 8  # of the sample, evenly spaced
_MAX_TEXT_BYTES = 4 << 20  # of the sample, per file
_MAX_TOKENIZED = 1 << 16  # characters of the sample, per file
_MAX_GROWTH = 100  # more bytes per byte of input are never needed
_BYTES_PER_KEY = 12  # of a document in a band: key and row
_MARGIN = 1.1


@dataclass
class _Sample:
    """Sizes of the beginning of an input file, in bytes; tokens: of a part of it."""

    read: int = 0
    text: int = 0
    compressed: int = 0
    documents: int = 0
    tokenized: int = 0
    tokens: int = 0

    def per_input_byte(self, num_bands: int, token_bytes: int) -> float:
        """Return the bytes of disk for each byte of the input file."""
        keys = self.documents * num_bands * _BYTES_PER_KEY
        tokens = self.text * self.tokens / max(self.tokenized, 1) * token_bytes
        return (2 * self.compressed + max(keys, tokens)) / max(self.read, 1)


def _sample(file: Location, tokenizer: Tokenizer | None) -> _Sample:
    sample = _Sample()
    texts: list[str] = []

    def count(num_bytes: int) -> None:
        sample.read += num_bytes

    for record in read_records([file], invalid=InvalidRecords(), progress=count):
        texts.append(record.as_text())
        sample.text += len(texts[-1].encode("utf-8", "surrogatepass"))
        if sample.text >= _MAX_TEXT_BYTES:
            break
    if file.suffix not in (*COMPRESSIONS, ".parquet"):
        sample.read = min(sample.read, sample.text)  # the reader is ahead of the records
    joined = "\n".join(texts)
    content = joined.encode("utf-8", "surrogatepass")
    sample.documents = len(texts)
    sample.compressed = len(zstandard.ZstdCompressor(level=WORK_LEVEL).compress(content))
    if tokenizer:
        excerpt = joined[:_MAX_TOKENIZED]
        sample.tokenized = len(excerpt.encode("utf-8", "surrogatepass"))
        sample.tokens = len(tokenizer.encode(excerpt))
    return sample


def needed_bytes(
    files: Sequence[Location], settings: PrepareSettings, tokenizer: Tokenizer | None
) -> int:
    """Estimate the bytes that the output folder of a preparation has at its largest.

    Raises DataError for a file that cannot be read.
    """
    selected = files[:: -(-len(files) // _MAX_FILES)]
    token_bytes = 4 if tokenizer and tokenizer.vocab_size > 1 << 16 else 2
    num_bands = settings.near_duplicates.bands + 1
    rates = [_sample(file, tokenizer).per_input_byte(num_bands, token_bytes) for file in selected]
    size = sum(file.stat().st_size for file in files)
    return round(sum(rates) / len(rates) * size * _MARGIN)


def check_space(
    folder: Path,
    files: Sequence[Location],
    settings: PrepareSettings,
    tokenizer: Path | None,
) -> None:
    """Raise ResourceError if the disk of the output folder is too small for a preparation.

    What an interrupted preparation has written counts as free.
    """
    free = shutil.disk_usage(folder).free
    if free > _MAX_GROWTH * sum(file.stat().st_size for file in files):
        return
    free += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    needed = needed_bytes(files, settings, Tokenizer.load(tokenizer) if tokenizer else None)
    if needed > free:
        raise ResourceError(
            f"{folder}: the preparation needs about {format_size(needed)} of disk, and "
            f"{format_size(free)} are free. Free some space, or choose another --out"
        )
