"""Stream of records from files of any format and schema.

The layers below: `input_files` lists the files, `compression` and `formats` turn them into values,
`schemas` converts values to records, `invalid` counts the invalid ones.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from minimind.data.compression import Progress
from minimind.data.formats import read_values
from minimind.data.input_files import list_files
from minimind.data.invalid import InvalidRecords
from minimind.data.locations import Location
from minimind.data.schemas import Record, convert, split_packed
from minimind.errors import DataError

_BATCH_RECORDS = 512
_BATCH_CHARACTERS = 1 << 20


def _ignore_progress(num_bytes: int) -> None:
    pass


def read_records(
    files: Iterable[Location],
    *,
    invalid: InvalidRecords,
    schema: str = "auto",
    progress: Progress | None = None,
) -> Iterator[Record]:
    """Yield the records of all files, in order.

    `progress(n)` is called with the number of bytes read since the last call. Raises DataError for
    a file that cannot be read at all or has no records, and when more than `invalid.max_fraction`
    of the records are invalid.
    """
    for file in files:
        before = invalid.num_valid + invalid.total
        for line, value in read_values(file, invalid, progress or _ignore_progress):
            try:
                if isinstance(value, dict):
                    record = convert(value, schema)
                elif isinstance(value, str) and value.strip():
                    record = Record(text=value)
                else:
                    raise ValueError(f"a JSON {type(value).__name__} instead of an object")
            except ValueError as error:
                invalid.add(file, line, str(error), value)
                continue
            invalid.num_valid += 1
            yield from split_packed(record)
        if invalid.num_valid + invalid.total == before:
            raise DataError(f"{file}: no records in it; leave it out, or download it again")


def read_objects(
    files: Iterable[Location], *, invalid: InvalidRecords
) -> Iterator[tuple[Location, int, dict[str, Any]]]:
    """Yield (file, line, object) of files with schemas other than those of training data.

    Values that are not objects are counted as invalid; the caller counts the valid ones. Raises
    DataError for a file that cannot be read at all.
    """
    for file in files:
        for line, value in read_values(file, invalid, _ignore_progress):
            if isinstance(value, dict):
                yield file, line, value
            else:
                reason = f"a JSON {type(value).__name__} instead of an object"
                invalid.add(file, line, reason, value)


def first_record(path: str, schema: str = "auto") -> Record:
    """Return the first record of the files that `path` names. Raises DataError without one."""
    invalid = InvalidRecords()
    for record in read_records(list_files(path), invalid=invalid, schema=schema):
        return record
    raise DataError(f"{path}: no valid record; the first invalid one: {invalid.first}")


def read_texts(
    files: Iterable[Location], *, invalid: InvalidRecords, progress: Progress | None = None
) -> Iterator[str]:
    """Yield the text of all records, whatever their schema."""
    return (record.as_text() for record in read_records(files, invalid=invalid, progress=progress))


def batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Group records into batches that are bounded in records and in characters."""
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += record.num_characters
        if len(batch) >= _BATCH_RECORDS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
