"""Dataset statistics: schemas, lengths, duplicates, invalid records, samples.

All files are read once, in bounded memory. In the histogram, lengths over 4,096 are rounded down by
at most 1 in 2,048. Duplicates are counted by 64-bit hashes of the records. Beyond half a million
distinct hashes, only hashes below a threshold are kept, and the count becomes an estimate (adaptive
sampling, Flajolet 1990). All copies of a record have the same hash, so they are kept or dropped
together.
"""

import heapq
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from minimind.data.compression import Progress
from minimind.data.encode import encode_records, reason_to_skip
from minimind.data.input_files import list_files
from minimind.data.invalid import InvalidRecords
from minimind.data.read import batches, read_records
from minimind.data.schemas import Record, count_unused
from minimind.tokenizer import Tokenizer

_EXACT_BITS = 12
_MAX_HASHES = 1 << 19
_SAMPLE_LENGTH = 160  # characters
# Unicode blocks of CJK ideographs: the common one first, then extensions.
_CHINESE_BLOCKS = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))


@dataclass
class LengthHistogram:
    """Histogram of lengths with percentiles, in bounded memory."""

    counts: Counter[int] = field(default_factory=Counter)
    total: int = 0
    longest: int = 0

    def add(self, length: int) -> None:
        shift = max(0, length.bit_length() - _EXACT_BITS)
        self.counts[length >> shift << shift] += 1
        self.total += length
        self.longest = max(self.longest, length)

    def merge(self, other: "LengthHistogram") -> None:
        self.counts.update(other.counts)
        self.total += other.total
        self.longest = max(self.longest, other.longest)

    def metrics(self) -> dict[str, int]:
        """Return the median, the 90th and 99th percentile, the maximum and the total."""
        lengths = sorted(self.counts)
        ranks = list(accumulate(self.counts[length] for length in lengths))

        def percentile(fraction: float) -> int:
            return lengths[bisect_left(ranks, fraction * ranks[-1])] if ranks else 0

        return {
            "median": percentile(0.5),
            "p90": percentile(0.9),
            "p99": percentile(0.99),
            "max": self.longest,
            "total": self.total,
        }


@dataclass
class Duplicates:
    """Number of records that repeat an earlier one, counted by hash.

    counts: number of records with each hash below `ceiling`.
    """

    counts: dict[int, int] = field(default_factory=dict)
    ceiling: int = 2**64

    def add(self, fingerprint: int, times: int = 1) -> None:
        if fingerprint < self.ceiling:
            self.counts[fingerprint] = self.counts.get(fingerprint, 0) + times
            while len(self.counts) > _MAX_HASHES:
                self._lower_ceiling(self.ceiling // 2)

    def merge(self, other: "Duplicates") -> None:
        self._lower_ceiling(min(self.ceiling, other.ceiling))
        for fingerprint, times in other.counts.items():
            self.add(fingerprint, times)

    def _lower_ceiling(self, ceiling: int) -> None:
        self.ceiling = ceiling
        self.counts = {h: times for h, times in self.counts.items() if h < ceiling}

    @property
    def is_exact(self) -> bool:
        """True if `total` is a count; False if it is an estimate."""
        return self.ceiling == 2**64

    @property
    def total(self) -> int:
        """Number of duplicate records, scaled up from the hashes that were kept."""
        return (sum(self.counts.values()) - len(self.counts)) * 2**64 // self.ceiling


@dataclass
class DatasetStats:
    """Statistics of a dataset."""

    num_files: int = 0
    num_bytes: int = 0
    schemas: Counter[str] = field(default_factory=Counter)
    single_turn: int = 0
    multi_turn: int = 0
    chinese_characters: int = 0
    characters: LengthHistogram = field(default_factory=LengthHistogram)
    tokens: LengthHistogram | None = None
    skipped: Counter[str] = field(default_factory=Counter)  # number of records, by reason
    unused_keys: Counter[str] = field(default_factory=Counter)
    duplicates: Duplicates = field(default_factory=Duplicates)
    invalid: InvalidRecords = field(default_factory=InvalidRecords)
    samples: list[str] = field(default_factory=list)

    def merge(self, other: "DatasetStats") -> None:
        """Add the counts of `other`, without its samples."""
        self.num_files += other.num_files
        self.num_bytes += other.num_bytes
        self.schemas.update(other.schemas)
        self.single_turn += other.single_turn
        self.multi_turn += other.multi_turn
        self.chinese_characters += other.chinese_characters
        self.characters.merge(other.characters)
        if other.tokens:
            self.tokens = self.tokens or LengthHistogram()
            self.tokens.merge(other.tokens)
        self.skipped.update(other.skipped)
        self.unused_keys.update(other.unused_keys)
        self.duplicates.merge(other.duplicates)
        self.invalid.merge(other.invalid)

    def metrics(self) -> dict[str, Any]:
        """Return all statistics as JSON values."""
        return {
            "files": self.num_files,
            "bytes": self.num_bytes,
            "schemas": dict(self.schemas.most_common()),
            "records": self.schemas.total(),
            "single_turn": self.single_turn,
            "multi_turn": self.multi_turn,
            "chinese_share": self.chinese_characters / max(self.characters.total, 1),
            "duplicates": self.duplicates.total,
            "duplicates_are_exact": self.duplicates.is_exact,
            "characters": self.characters.metrics(),
            "tokens": self.tokens.metrics() if self.tokens else None,
            "skipped": dict(self.skipped.most_common()),
            "unused_keys": dict(self.unused_keys.most_common()),
            "invalid_records": self.invalid.total,
            "invalid_reasons": {
                reason: {"records": count, "first": self.invalid.locations[reason]}
                for reason, count in self.invalid.reasons.most_common()
            },
            "samples": self.samples,
        }


def inspect_data(
    path: str,
    *,
    schema: str = "auto",
    tokenizer: Tokenizer | None = None,
    num_samples: int = 3,
    progress: Progress | None = None,
) -> DatasetStats:
    """Read all files that `path` (a file, folder or glob) names, and compute statistics.

    `progress(n)` is called with the number of bytes read since the last call. Tokens are counted as
    in training: control tokens and both sides of a preference pair are included; records that the
    model's own chat template does not support are left out. Raises DataError for files
    that cannot be read at all.
    """
    files = list_files(path)
    stats = DatasetStats(
        num_files=len(files),
        num_bytes=sum(file.stat().st_size for file in files),
        tokens=LengthHistogram() if tokenizer else None,
    )
    sample: list[tuple[int, str]] = []
    records = read_records(files, invalid=stats.invalid, schema=schema, progress=progress)
    for batch in batches(records):
        stats.schemas.update(record.schema for record in batch)
        stats.chinese_characters += _count_chinese("".join(record.as_text() for record in batch))
        for record in batch:
            fingerprint = record.fingerprint()
            stats.duplicates.add(fingerprint)
            stats.characters.add(record.num_characters)
            messages = record.messages or record.chosen or []
            num_answers = sum(message["role"] == "assistant" for message in messages)
            stats.single_turn += num_answers == 1
            stats.multi_turn += num_answers > 1
            _update_sample(sample, num_samples, record, fingerprint)
            count_unused(stats.unused_keys, record)
        if tokenizer and stats.tokens:
            reasons = [reason_to_skip(record, tokenizer, None) for record in batch]
            stats.skipped.update(reason for reason in reasons if reason)
            used = [r for r, reason in zip(batch, reasons, strict=True) if not reason]
            for documents in encode_records(used, tokenizer, None):
                stats.tokens.add(sum(len(ids) for ids, _ in documents))
    stats.samples = [text for _, text in sorted(sample, reverse=True)]
    return stats


def _count_chinese(text: str) -> int:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return sum(int(((codes >= low) & (codes <= high)).sum()) for low, high in _CHINESE_BLOCKS)


def _update_sample(
    sample: list[tuple[int, str]], size: int, record: Record, fingerprint: int
) -> None:
    """Keep the records with the smallest hashes: a uniform sample of the distinct records.

    sample: a heap of (-hash, text).
    """
    if len(sample) >= size and (not sample or -fingerprint <= sample[0][0]):
        return
    if all(-fingerprint != other for other, _ in sample):
        heapq.heappush(sample, (-fingerprint, _preview(record)))
        if len(sample) > size:
            heapq.heappop(sample)


def _preview(record: Record) -> str:
    """Return the beginning of a record on one line, without control characters."""
    if record.text is not None:
        text = record.text[: _SAMPLE_LENGTH + 1]
    else:
        messages = record.messages or record.chosen or []
        text = "\n".join(f"{m['role']}: {m['content'][: _SAMPLE_LENGTH + 1]}" for m in messages)
    line = " ⏎ ".join(part.strip() for part in text.splitlines() if part.strip())
    line = "".join(c if c.isprintable() else "\ufffd" for c in line)
    return line if len(line) <= _SAMPLE_LENGTH else line[:_SAMPLE_LENGTH] + "…"
