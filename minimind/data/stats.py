"""What data holds, before anything is trained on it.

Read from end to end in bounded memory. Lengths are counted in a histogram that rounds those over
4,096 down by at most one in 2,048. Copies are found by 64-bit hashes of the records; beyond half
a million different ones the upper half of the hashes is dropped (so that all copies of a record
stay or go together), and the number of copies is an estimate.
"""

import heapq
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from minimind.data.encode import encode_records, reason_to_skip
from minimind.data.read import InvalidRecords, Progress, batches, list_files, read_records
from minimind.data.schemas import Record, count_unused
from minimind.tokenizer import Tokenizer

_EXACT_BITS = 12
_MOST_HASHES = 1 << 19
_SAMPLE_LENGTH = 160  # characters
# The blocks of ideographs of Unicode: the common ones first, then the extensions.
_CHINESE = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))


@dataclass
class LengthHistogram:
    """How often each length occurs."""

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
        """Median, 90th and 99th percentile, longest, and the sum of all."""
        lengths = sorted(self.counts)
        ranks = list(accumulate(self.counts[length] for length in lengths))

        def at(share: float) -> int:
            return lengths[bisect_left(ranks, share * ranks[-1])] if ranks else 0

        return {
            "median": at(0.5),
            "p90": at(0.9),
            "p99": at(0.99),
            "max": self.longest,
            "total": self.total,
        }


@dataclass
class Duplicates:
    """Counts records that have been there before."""

    hashes: dict[int, int] = field(default_factory=dict)
    ceiling: int = 2**64

    def add(self, fingerprint: int, times: int = 1) -> None:
        if fingerprint < self.ceiling:
            self.hashes[fingerprint] = self.hashes.get(fingerprint, 0) + times
            while len(self.hashes) > _MOST_HASHES:
                self._lower(self.ceiling // 2)

    def merge(self, other: "Duplicates") -> None:
        self._lower(min(self.ceiling, other.ceiling))
        for fingerprint, times in other.hashes.items():
            self.add(fingerprint, times)

    def _lower(self, ceiling: int) -> None:
        self.ceiling = ceiling
        self.hashes = {h: times for h, times in self.hashes.items() if h < ceiling}

    @property
    def is_exact(self) -> bool:
        """Whether `total` is no estimate."""
        return self.ceiling == 2**64

    @property
    def total(self) -> int:
        """How many records are copies of earlier ones."""
        return (sum(self.hashes.values()) - len(self.hashes)) * 2**64 // self.ceiling


@dataclass
class DatasetStats:
    """What some data holds."""

    num_files: int = 0
    num_bytes: int = 0
    schemas: Counter[str] = field(default_factory=Counter)
    single_turn: int = 0
    multi_turn: int = 0
    chinese: int = 0  # characters
    characters: LengthHistogram = field(default_factory=LengthHistogram)
    tokens: LengthHistogram | None = None
    skipped: Counter[str] = field(default_factory=Counter)  # of the tokens, by reason
    unused_keys: Counter[str] = field(default_factory=Counter)
    copies: Duplicates = field(default_factory=Duplicates)
    bad: InvalidRecords = field(default_factory=InvalidRecords)
    samples: list[str] = field(default_factory=list)

    def merge(self, part: "DatasetStats") -> None:
        """Count `part` in; its samples are left out."""
        self.num_files += part.num_files
        self.num_bytes += part.num_bytes
        self.schemas.update(part.schemas)
        self.single_turn += part.single_turn
        self.multi_turn += part.multi_turn
        self.chinese += part.chinese
        self.characters.merge(part.characters)
        if part.tokens:
            self.tokens = self.tokens or LengthHistogram()
            self.tokens.merge(part.tokens)
        self.skipped.update(part.skipped)
        self.unused_keys.update(part.unused_keys)
        self.copies.merge(part.copies)
        self.bad.merge(part.bad)

    def metrics(self) -> dict[str, Any]:
        """All of it, plain enough for JSON."""
        return {
            "files": self.num_files,
            "bytes": self.num_bytes,
            "schemas": dict(self.schemas.most_common()),
            "records": self.schemas.total(),
            "single_turn": self.single_turn,
            "multi_turn": self.multi_turn,
            "chinese_share": self.chinese / max(self.characters.total, 1),
            "copies": self.copies.total,
            "copies_are_exact": self.copies.is_exact,
            "characters": self.characters.metrics(),
            "tokens": self.tokens.metrics() if self.tokens else None,
            "skipped": dict(self.skipped.most_common()),
            "unused_keys": dict(self.unused_keys.most_common()),
            "bad_lines": self.bad.total,
            "bad_reasons": {
                reason: {"lines": count, "first": self.bad.places[reason]}
                for reason, count in self.bad.reasons.most_common()
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
    """Read all that `path` (file, folder or glob) means, and count.

    `progress(n)` is called with the number of bytes of the files read since the last call. Tokens
    are as in training: with the control tokens of the chat format, of a pair both sides, none of a
    record that the model's own chat template refuses. Raises DataError for files that cannot be
    read at all.
    """
    files = list_files(path)
    found = DatasetStats(
        num_files=len(files),
        num_bytes=sum(file.stat().st_size for file in files),
        tokens=LengthHistogram() if tokenizer else None,
    )
    kept: list[tuple[int, str]] = []
    for batch in batches(read_records(files, bad=found.bad, schema=schema, progress=progress)):
        found.schemas.update(record.schema for record in batch)
        found.chinese += _count_chinese("".join(record.as_text() for record in batch))
        for record in batch:
            fingerprint = record.fingerprint()
            found.copies.add(fingerprint)
            found.characters.add(sum(map(len, record.texts)))
            answers = _count_answers(record)
            found.single_turn += answers == 1
            found.multi_turn += answers > 1
            _sample(record, fingerprint, kept, num_samples)
            count_unused(found.unused_keys, record)
        if tokenizer and found.tokens:
            reasons = [reason_to_skip(record, tokenizer, None) for record in batch]
            found.skipped.update(reason for reason in reasons if reason)
            fit = [r for r, reason in zip(batch, reasons, strict=True) if not reason]
            for documents in encode_records(fit, tokenizer, None):
                found.tokens.add(sum(len(ids) for ids, _ in documents))
    found.samples = [sample for _, sample in sorted(kept, reverse=True)]
    return found


def _count_chinese(text: str) -> int:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return sum(int(((codes >= low) & (codes <= high)).sum()) for low, high in _CHINESE)


def _count_answers(record: Record) -> int:
    messages = record.messages or record.chosen or []
    return sum(message["role"] == "assistant" for message in messages)


def _sample(
    record: Record, fingerprint: int, kept: list[tuple[int, str]], num_samples: int
) -> None:
    """Keep the records of the smallest hashes, which are as even a sample as there is.

    kept: a heap of (-hash, text).
    """
    if len(kept) >= num_samples and (not kept or -fingerprint <= kept[0][0]):
        return
    if all(-fingerprint != other for other, _ in kept):
        heapq.heappush(kept, (-fingerprint, _shortened(record)))
        if len(kept) > num_samples:
            heapq.heappop(kept)


def _shortened(record: Record) -> str:
    """The beginning of a record on one line, safe to print."""
    if record.text is not None:
        text = record.text[: _SAMPLE_LENGTH + 1]
    else:
        messages = record.messages or record.chosen or []
        text = "\n".join(f"{m['role']}: {m['content'][: _SAMPLE_LENGTH + 1]}" for m in messages)
    line = " ⏎ ".join(part.strip() for part in text.splitlines() if part.strip())
    line = "".join(c if c.isprintable() else "\ufffd" for c in line)
    return line if len(line) <= _SAMPLE_LENGTH else line[:_SAMPLE_LENGTH] + "…"
