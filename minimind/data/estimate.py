"""Estimate the number of training tokens in data from a sample.

Up to 16 files, evenly spaced over the bytes of all files, are read: at most 32 MiB in total, from
the beginning of each file. Of the records read, an evenly spaced sample of two million characters
is tokenized. Records are counted, substituted and skipped as in training.
"""

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

from minimind.data.encode import Kind, encode_records, reason_to_skip
from minimind.data.input_files import list_files
from minimind.data.invalid import InvalidRecords
from minimind.data.read import batches, read_records
from minimind.data.schemas import Record
from minimind.tokenizer import Tokenizer

_MAX_FILES = 16
_MAX_BYTES = 32 << 20  # limit on bytes read, over all files
_MAX_CHARACTERS = 128 << 20  # limit on characters read, over all files
_SAMPLE_CHARACTERS = 2_000_000  # limit on characters tokenized, over all files


def estimate_tokens(
    path: str,
    tokenizer: Tokenizer,
    *,
    kind: Kind | None = None,
    schema: str = "auto",
    variables: Mapping[str, str] | None = None,
    seq_len: int | None = None,
) -> int:
    """Estimate the number of tokens that a token store of `path` would have, in both splits.

    Without `kind`, records of every kind are counted. seq_len: count only the tokens of a
    conversation or pair that sequences of this length have room for. Raises DataError for files
    that cannot be read.
    """
    files = list_files(path)
    sizes = [file.stat().st_size for file in files]
    if not any(sizes):
        return 0
    selected = _select_files(sizes)
    estimates = [
        _FileSample(files[number], schema, len(selected)).estimate(
            tokenizer, kind, variables or {}, seq_len
        )
        for number in selected
    ]
    if len(selected) == len(files):
        return round(sum(estimates))
    # Each selected file represents an equal share of all bytes.
    rates = [tokens / sizes[number] for tokens, number in zip(estimates, selected, strict=True)]
    return round(sum(rates) / len(rates) * sum(sizes))


def _select_files(sizes: list[int]) -> list[int]:
    """Return the indices of the files to read: all, or those at evenly spaced bytes.

    A large file may be selected several times.
    """
    if len(sizes) <= _MAX_FILES:
        return list(range(len(sizes)))
    ends = list(accumulate(sizes))
    step = ends[-1] / _MAX_FILES
    return [bisect_right(ends, (number + 0.5) * step) for number in range(_MAX_FILES)]


class _FileSample:
    """Evenly spaced sample of the records at the beginning of a file.

    records: every `_stride`-th record. num_bytes: bytes of the file that were read. num_characters:
    characters of all records in these bytes.
    """

    def __init__(self, file: Path, schema: str, num_files: int) -> None:
        self.file = file
        self.records: list[Record] = []
        self.num_bytes = self.num_characters = 0
        self._stride, self._sampled_characters = 1, 0
        self._bytes_reported = self._characters_seen = 0
        max_bytes, max_characters = _MAX_BYTES // num_files, _MAX_CHARACTERS // num_files
        records = read_records(
            [file], invalid=InvalidRecords(), schema=schema, progress=self._on_read
        )
        for number, record in enumerate(records):
            self._add(number, record, _SAMPLE_CHARACTERS // num_files)
            if self.num_characters and (
                self.num_bytes >= max_bytes or self._characters_seen >= max_characters
            ):
                break
        else:
            self.num_bytes, self.num_characters = file.stat().st_size, self._characters_seen

    def _on_read(self, num_bytes: int) -> None:
        # `num_bytes` and `num_characters` must describe the same part of the file. When the next
        # chunk is read, all bytes before it have become records, except for a partial last line.
        # If that line spans several chunks, the first chunk is the nearest to the last record.
        if self._characters_seen > self.num_characters:
            self.num_bytes, self.num_characters = self._bytes_reported, self._characters_seen
        self._bytes_reported += num_bytes

    def _add(self, number: int, record: Record, target: int) -> None:
        """Sample a record if it is due; beyond twice the target, drop every other record."""
        self._characters_seen += record.num_characters
        if number % self._stride == 0:
            self.records.append(record)
            self._sampled_characters += record.num_characters
        if self._sampled_characters > 2 * target and len(self.records) > 1:
            self.records = self.records[::2]
            self._sampled_characters = sum(sampled.num_characters for sampled in self.records)
            self._stride *= 2

    def estimate(
        self,
        tokenizer: Tokenizer,
        kind: Kind | None,
        variables: Mapping[str, str],
        seq_len: int | None,
    ) -> float:
        """Estimate the number of tokens of the complete file."""
        tokens = 0
        for batch in batches(self.records):
            used = [
                r.substitute(variables) for r in batch if not reason_to_skip(r, tokenizer, kind)
            ]
            for documents in encode_records(used, tokenizer, kind):
                tokens += sum(_used([len(ids) for ids, _ in documents], kind, seq_len))
        if not tokens:
            return 0.0
        sampled = sum(record.num_characters for record in self.records)
        size = self.file.stat().st_size
        return tokens * self.num_characters / sampled * size / self.num_bytes


def _used(sizes: list[int], kind: Kind | None, seq_len: int | None) -> list[int]:
    """Return the tokens of the documents of a record that `packing.py` keeps."""
    if seq_len is None or kind not in ("chat", "pairs"):
        return sizes
    if kind == "chat":
        return [min(size, seq_len + 1) for size in sizes]
    positions = [size - 1 for size in sizes]
    return [
        min(own, max(seq_len // 2, seq_len - other)) + 1
        for own, other in zip(positions, reversed(positions), strict=True)
    ]
