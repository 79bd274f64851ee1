"""How many tokens training would find in data, from a part of it.

Up to 16 files are read, evenly over the bytes of all, and 32 MiB of these together: data of that
size from end to end, of larger files the beginning. Of the records read, an even sample of two
million characters is tokenized. Records are counted, filled and left out as in training.
"""

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

from minimind.data.encode import Kind, encode_records, reason_to_skip
from minimind.data.read import InvalidRecords, batches, list_files, read_records
from minimind.data.schemas import Record
from minimind.tokenizer import Tokenizer

_MOST_FILES = 16
_MOST_BYTES = 32 << 20  # read, of all files together
_MOST_CHARACTERS = 128 << 20  # the same of what compressed files unpack to
_TOKENIZED = 2_000_000  # characters, of all files together


def estimate_tokens(
    path: str,
    tokenizer: Tokenizer,
    *,
    kind: Kind | None = None,
    schema: str = "auto",
    fill: Mapping[str, str] | None = None,
) -> int:
    """Estimate the tokens that a store of `path` would hold, in both splits together.

    Without `kind` each record counts as what it is. Raises DataError for files that cannot be read
    at all.
    """
    files = list_files(path)
    sizes = [file.stat().st_size for file in files]
    picked = _spread(sizes)
    estimates = [
        _Sample(files[number], schema, len(picked)).tokens(tokenizer, kind, fill or {})
        for number in picked
    ]
    if len(picked) == len(files):
        return round(sum(estimates))
    # Each of the picked files stands for an equal part of all bytes.
    rates = [tokens / sizes[number] for tokens, number in zip(estimates, picked, strict=True)]
    return round(sum(rates) / len(rates) * sum(sizes))


def _spread(sizes: list[int]) -> list[int]:
    """Numbers of the files to read: all if they are few, else at even distances in all bytes.

    A large file may come several times.
    """
    if len(sizes) <= _MOST_FILES:
        return list(range(len(sizes)))
    ends = list(accumulate(sizes))
    step = ends[-1] / _MOST_FILES
    return [bisect_right(ends, (number + 0.5) * step) for number in range(_MOST_FILES)]


class _Sample:
    """An even sample of the records at the beginning of a file, and how much of the file that is.

    records: every `_every`-th one; the distance doubles each time that there are enough. read: the
    bytes of the file, and characters: those of all records in these bytes.
    """

    def __init__(self, file: Path, schema: str, num_files: int) -> None:
        self.file = file
        self.records: list[Record] = []
        self.read = self.characters = 0
        self._every, self._kept = 1, 0
        self._taken = self._seen = 0
        most_bytes, most_characters = _MOST_BYTES // num_files, _MOST_CHARACTERS // num_files
        records = read_records([file], bad=InvalidRecords(), schema=schema, progress=self._progress)
        for number, record in enumerate(records):
            self._add(number, record, _TOKENIZED // num_files)
            if self.characters and (self.read >= most_bytes or self._seen >= most_characters):
                break
        else:
            self.read, self.characters = file.stat().st_size, self._seen

    def _progress(self, num_bytes: int) -> None:
        # When more is read, what was read before has become records, but for the last line. Of one
        # that is longer than a read, the first read is nearest to the end of the record before.
        if self._seen > self.characters:
            self.read, self.characters = self._taken, self._seen
        self._taken += num_bytes

    def _add(self, number: int, record: Record, most: int) -> None:
        size = _size(record)
        self._seen += size
        if number % self._every == 0:
            self.records.append(record)
            self._kept += size
        if self._kept > 2 * most and len(self.records) > 1:
            self.records = self.records[::2]
            self._kept = sum(map(_size, self.records))
            self._every *= 2

    def tokens(self, tokenizer: Tokenizer, kind: Kind | None, fill: Mapping[str, str]) -> float:
        """Estimate the tokens of the whole file."""
        tokens = 0
        for batch in batches(self.records):
            used = [r.filled(fill) for r in batch if not reason_to_skip(r, tokenizer, kind)]
            for documents in encode_records(used, tokenizer, kind):
                tokens += sum(len(ids) for ids, _ in documents)
        if not tokens:
            return 0.0
        in_sample = sum(map(_size, self.records))
        return tokens * self.characters / in_sample * self.file.stat().st_size / self.read


def _size(record: Record) -> int:
    return sum(map(len, record.texts))
