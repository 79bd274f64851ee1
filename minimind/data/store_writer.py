"""Build a token store: read, substitute, encode and write. Encoding is one batch ahead."""

import contextlib
import os
import shutil
import uuid
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from minimind.data.encode import KIND_NAMES, Kind, encode_records, reason_to_skip
from minimind.data.invalid import InvalidRecords
from minimind.data.locations import Location
from minimind.data.read import batches, read_records
from minimind.data.schemas import Record, count_unused, variables_in
from minimind.data.stamps import settled_stamp_of, sha256_of, stamp_of
from minimind.data.store_manifest import (
    SPLITS,
    Split,
    invalid_records_file,
    unsubstituted,
    write_manifest,
)
from minimind.errors import DataError, ResourceError
from minimind.tokenizer import Tokenizer
from minimind.tokenizer.chat import unsupported_reason

OTHER_FOLDER = "choose another folder with data.store=DIR or the variable MINIMIND_CACHE"
_SHARD_TOKENS = 1 << 27
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass
class _ByteCounts:
    """Bytes of input that were read and encoded, and bytes of output."""

    input_size: int
    num_read: int = 0
    num_encoded: int = 0
    num_written: int = 0

    def add_read(self, num_bytes: int) -> None:
        self.num_read += num_bytes

    def estimated_size(self) -> int:
        """Return the size of the finished store in bytes, extrapolated from the progress."""
        if not self.num_encoded:
            return self.input_size
        return self.num_written * self.input_size // self.num_encoded


def build_store(
    folder: Path,
    files: list[Path],
    tokenizer: Tokenizer,
    spec: dict[str, Any],
    max_invalid_fraction: float,
    progress: Callable[[int, int], None],
) -> None:
    """Build the store in a temporary folder, and rename that to `folder` when it is complete.

    spec: the entries of the manifest that identify the store. Raises DataError for invalid input,
    ResourceError when the store cannot be written.
    """
    counts = _ByteCounts(sum(entry["size"] for entry in spec["files"]))
    quarantine = invalid_records_file(folder)
    temporary: Path | None = None
    try:
        quarantine.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
        temporary.mkdir()  # unlike tempfile.mkdtemp, readable for others if the umask permits
        invalid = InvalidRecords(quarantine, max_invalid_fraction)
        written = _write(temporary, files, tokenizer, spec, invalid, counts, progress)
        write_manifest(temporary, spec | written)
        os.replace(temporary, folder)
        temporary = None
    except BrokenPipeError:  # from `progress`, whose output is closed; not an error of the disk
        raise
    except OSError as error:
        raise ResourceError(
            f"{folder}: cannot write the token store ({error.strerror}). It takes about "
            f"{counts.estimated_size():,} bytes; {shutil.disk_usage(folder.parent).free:,} are "
            f"free. Free some space, or {OTHER_FOLDER}"
        ) from error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def _write(
    folder: Path,
    files: list[Path],
    tokenizer: Tokenizer,
    spec: dict[str, Any],
    invalid: InvalidRecords,
    counts: _ByteCounts,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write the tokens of `files` into `folder`; return the counts for the manifest."""
    kind: Kind = spec["kind"]
    variables: dict[str, str] = spec["variables"]
    dtype = _dtype(tokenizer)
    stamps = [stamp_of(file) for file in files]
    records = read_records(files, schema=spec["schema"], invalid=invalid, progress=counts.add_read)
    skipped, occurrences, unused = Counter[str](), Counter[str](), Counter[str]()
    num_records = 0
    progress(0, counts.input_size)
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(_SplitWriter(folder, split, kind)) for split in SPLITS
        }
        encode = partial(
            _encode_batch,
            tokenizer=tokenizer,
            kind=kind,
            dtype=dtype,
            validation_limit=int(spec["validation_fraction"] * 2**64),
        )
        substituted = _substituted(records, variables, occurrences, unused)
        numbered = ((batch, counts.num_read) for batch in batches(substituted))
        for batch in _map_ahead(encode, numbered):
            skipped += batch.skipped
            num_records += batch.num_records
            counts.num_encoded = batch.bytes_read
            for split, writer in writers.items():
                counts.num_written += writer.add(batch.documents[split])
            progress(batch.bytes_read, counts.input_size)
    progress(counts.input_size, counts.input_size)
    invalid.check(invalid.max_fraction, final=True)
    splits = {split: writer.counts for split, writer in writers.items()}
    if not any(split["documents"] for split in splits.values()):
        raise _no_documents(files, tokenizer, spec, skipped)
    return splits | {
        "dtype": dtype,
        "files": [
            _with_hash(file, entry, stamp)
            for file, entry, stamp in zip(files, spec["files"], stamps, strict=True)
        ],
        "records": num_records,
        "valid_records": invalid.num_valid,  # before packed ones are split; of plain text: lines
        "invalid_records": invalid.total,
        "invalid_summary": invalid.describe() if invalid.total else "",
        "invalid_records_file": str(invalid.path) if invalid.total else None,
        "skipped": dict(skipped.most_common()),
        "unused_keys": dict(unused.most_common()),
        "substituted": sorted(occurrences.keys() & variables.keys()),
        "unsubstituted": unsubstituted(occurrences, kind, variables),
    }


def _no_documents(
    files: list[Path], tokenizer: Tokenizer, spec: dict[str, Any], skipped: "Counter[str]"
) -> DataError:
    """Return the error for files without records of the wanted kind."""
    kind: Kind = spec["kind"]
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common())
    records = read_records(files, schema=spec["schema"], invalid=InvalidRecords())
    first = next((chat for record in records for chat, _ in record.conversations), None)
    unsupported = first and unsupported_reason(tokenizer, first)
    return DataError(
        f"{files[0]}{' and others' if len(files) > 1 else ''}: no {KIND_NAMES[kind]} found"
        + (f" (skipped records: {reasons})" if skipped else "")
        + (", each with chosen and rejected answers" if kind == "pairs" else "")
        + "; `minimind data inspect` shows the contents of the files"
        + (f". The first conversation: {unsupported}" if unsupported else "")
    )


def _substituted(
    records: Iterable[Record],
    variables: Mapping[str, str],
    occurrences: "Counter[str]",
    unused: "Counter[str]",
) -> Iterator[Record]:
    """Substitute variables; count the records with each variable and each unused key."""
    for record in records:
        count_unused(unused, record)
        names = {name for text in record.texts for name in variables_in(text)}
        occurrences.update(names)
        yield record.substitute(variables) if names else record


class PartWriter:
    """Tokenizes some running text to the shards `number` of a store. Use it in a `with` block.

    The text must be small enough for one shard. `finish_store` combines the parts. Files of the
    part that exist are replaced.
    """

    def __init__(
        self, folder: Path, number: int, tokenizer: Tokenizer, validation_fraction: float
    ) -> None:
        self._tokenizer = tokenizer
        self._validation_limit = int(validation_fraction * 2**64)
        self._writers = {split: _SplitWriter(folder, split, "text", number) for split in SPLITS}
        self._num_records = 0

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for writer in self._writers.values():
            writer.__exit__(kind, error, trace)

    def add(self, texts: Iterable[str]) -> None:
        """Append documents."""
        for batch in batches(map(Record, texts)):
            encoded = _encode_batch(
                (batch, 0),
                tokenizer=self._tokenizer,
                kind="text",
                dtype=_dtype(self._tokenizer),
                validation_limit=self._validation_limit,
            )
            self._num_records += encoded.num_records
            for split, writer in self._writers.items():
                writer.add(encoded.documents[split])

    def result(self) -> dict[str, Any]:
        """Return the counts of the part, for `finish_store`."""
        splits = {split: writer.counts for split, writer in self._writers.items()}
        return splits | {"records": self._num_records}


def finish_store(
    folder: Path,
    files: Sequence[Location],
    sha256s: Sequence[str],
    tokenizer: Tokenizer,
    spec: dict[str, Any],
    parts: list[dict[str, Any]],
) -> None:
    """Write the manifest of a store from the counts that `PartWriter` returned for each file.

    sha256s: of the files.
    """
    splits = {
        split: {
            name: sum((part[split][name] for part in parts), start=type(parts[0][split][name])())
            for name in parts[0][split]
        }
        for split in SPLITS
    }
    counts = {
        "dtype": _dtype(tokenizer),
        "files": [
            entry | {"sha256": sha256, "stamp": settled_stamp_of(file)}
            for file, sha256, entry in zip(files, sha256s, spec["files"], strict=True)
        ],
        "records": sum(part["records"] for part in parts),
        "valid_records": sum(part["records"] for part in parts),
        "invalid_records": 0,
        "invalid_summary": "",
        "invalid_records_file": None,
        "skipped": {},
        "unused_keys": {},
        "unsubstituted": {},
        "substituted": [],
    }
    write_manifest(folder, spec | splits | counts)


def _dtype(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def _with_hash(file: Path, entry: dict[str, Any], stamp: list[int]) -> dict[str, Any]:
    """Add the hash to a file's entry. Raises DataError if the file changed since `stamp`."""
    sha256 = sha256_of(file)
    if stamp_of(file) != stamp:
        raise DataError(
            f"{file}: the file changed while it was read; start again when it is complete"
        )
    return entry | {"sha256": sha256, "stamp": settled_stamp_of(file)}


def _map_ahead(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """Map in a background thread, one item ahead of the results that the caller uses."""
    with ThreadPoolExecutor(1) as pool:
        running: Future[_Result] | None = None
        for item in items:
            following = pool.submit(function, item)
            if running:
                yield running.result()
            running = following
        if running:
            yield running.result()


@dataclass
class _Documents:
    """Documents of one split: concatenated tokens and masks, and the length of each document."""

    tokens: "array[int]"  # quoted: Python 3.11 cannot subscript array at run time
    mask: "array[int]" = field(default_factory=lambda: array("B"))
    lengths: list[int] = field(default_factory=list)
    num_characters: int = 0
    num_bytes: int = 0


@dataclass
class _EncodedBatch:
    """The documents of a batch of records. bytes_read: bytes of input up to its end."""

    documents: dict[Split, _Documents]
    skipped: "Counter[str]"
    num_records: int
    bytes_read: int


def _encode_batch(
    numbered: tuple[list[Record], int],
    *,
    tokenizer: Tokenizer,
    kind: Kind,
    dtype: str,
    validation_limit: int,
) -> _EncodedBatch:
    """Encode a batch of records, given with the bytes of input read so far.

    Records with a split key below `validation_limit` belong to the validation split.
    """
    batch, bytes_read = numbered
    skipped = Counter[str]()
    used = []
    for record in batch:
        if reason := reason_to_skip(record, tokenizer, kind):
            skipped[reason] += 1
        else:
            used.append(record)
    code = {"uint16": "H", "uint32": "I"}[dtype]
    splits: dict[Split, _Documents] = {split: _Documents(array(code)) for split in SPLITS}
    for record, encoded in zip(used, encode_records(used, tokenizer, kind), strict=True):
        documents = splits["validation" if record.split_key() < validation_limit else "train"]
        for ids, mask in encoded:
            documents.tokens.fromlist(ids)
            documents.mask.fromlist(mask)
            documents.lengths.append(len(ids))
        for text in record.texts:
            documents.num_characters += len(text)
            documents.num_bytes += len(text.encode("utf-8", "surrogatepass"))
    return _EncodedBatch(splits, skipped, len(batch), bytes_read)


class _SplitWriter:
    """Append documents to the shards of one split."""

    def __init__(self, folder: Path, split: Split, kind: Kind, first: int = 0) -> None:
        """Write shards from the number `first` on."""
        self._folder, self._split, self._first = folder, split, first
        self._suffixes = ("tokens", "ends", "mask") if kind != "text" else ("tokens", "ends")
        self._streams: list[BinaryIO] = []
        self._shards: list[dict[str, Any]] = []
        self._num_characters = self._num_bytes = 0

    def __enter__(self) -> "_SplitWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._close_shard()
        finally:
            for stream in self._streams:
                with contextlib.suppress(OSError):  # a full disk has been reported already
                    stream.close()

    def add(self, documents: _Documents) -> int:
        """Append documents; return the number of bytes written."""
        if not documents.lengths:
            return 0
        if not self._shards or self._shards[-1]["tokens"] >= _SHARD_TOKENS:
            self._open_shard()
        shard = self._shards[-1]
        ends = shard["tokens"] + np.cumsum(documents.lengths, dtype=np.int64)
        contents = [documents.tokens, ends, documents.mask]
        shard["tokens"] = int(ends[-1])
        shard["documents"] += len(ends)
        self._num_characters += documents.num_characters
        self._num_bytes += documents.num_bytes
        return sum(s.write(content) for s, content in zip(self._streams, contents, strict=False))

    def _open_shard(self) -> None:
        self._close_shard()
        name = f"{self._split}-{self._first + len(self._shards):05}"
        paths = [self._folder / f"{name}.{suffix}" for suffix in self._suffixes]
        self._streams = [path.open("wb") for path in paths]
        self._shards.append({"name": name, "tokens": 0, "documents": 0})

    def _close_shard(self) -> None:
        for stream in self._streams:
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()

    @property
    def counts(self) -> dict[str, Any]:
        """Counts of the split for the manifest."""
        return {
            "tokens": sum(shard["tokens"] for shard in self._shards),
            "documents": sum(shard["documents"] for shard in self._shards),
            "characters": self._num_characters,
            "bytes": self._num_bytes,
            "shards": self._shards,
        }
