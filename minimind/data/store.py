"""The token store: text tokenized once, kept on disk, read through memory maps.

    <store>/manifest.json            what it was made from, counts; written last
            train-00000.tokens       token ids, uint16 (uint32 for vocabularies over 65,536)
            train-00000.mask         chat only: uint8, 1 where the model is to produce the token
            train-00000.ends         int64, where each document ends
            validation-00000.*       the documents held out

A store holds one part of a mix. Which documents are held out depends on their text alone, so it
is the same in any order of files, and copies of one document stay on one side.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from minimind.data.read import BadLines, Record, list_files, read_records
from minimind.errors import DataError, ResourceError
from minimind.tokenizer import Tokenizer
from minimind.tokenizer.chat import encode_chats

Kind = Literal["text", "chat"]
Split = Literal["train", "validation"]
_FORMAT = 1
_BATCH_RECORDS = 512
_SHARD_TOKENS = 1 << 27


@dataclass(frozen=True)
class Shard:
    """Tokens of some documents, memory-mapped.

    tokens: [n] ids; mask: [n] or None; ends: [documents] where each document ends.
    """

    tokens: NDArray[Any]
    mask: NDArray[np.uint8] | None
    ends: NDArray[np.int64]


class TokenStore:
    """A finished store on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text("utf-8"))

    def shards(self, split: Split) -> list[Shard]:
        """The shards of one side, as memory maps."""
        return [
            Shard(
                tokens=_map(self.folder / f"{name}.tokens", self.manifest["dtype"]),
                mask=_map(self.folder / f"{name}.mask", "uint8")
                if self.manifest["kind"] == "chat"
                else None,
                ends=_map(self.folder / f"{name}.ends", "int64"),
            )
            for name in self.manifest[split]["shards"]
        ]

    def unigram_counts(self, vocab_size: int, most: int = 1 << 24) -> NDArray[np.int64]:
        """How often each token occurs in (at most the first `most` tokens of) the training side."""
        counts = np.zeros(vocab_size, np.int64)
        for shard in self.shards("train"):
            counts += np.bincount(shard.tokens[:most], minlength=vocab_size)
        return counts


def _map(path: Path, dtype: str) -> NDArray[Any]:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def default_folder() -> Path:
    """Where token stores are kept: `$MINIMIND_CACHE/stores`, or the user's cache folder."""
    cache = os.environ.get("MINIMIND_CACHE")
    root = Path(cache) if cache else Path.home() / ".cache" / "minimind"
    return root / "stores"


def open_store(
    path: str,
    tokenizer: Tokenizer,
    *,
    kind: Kind,
    schema: str = "auto",
    validation_fraction: float = 0.0,
    max_bad_fraction: float = 0.05,
    folder: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TokenStore:
    """Find the token store of `path` (file, folder or glob), or make it.

    `progress(done, total)` is called with bytes of input. Raises DataError when the input cannot
    be read or has too many bad lines, and ResourceError when the disk is full.
    """
    files = list_files(path)
    described = {
        "format": _FORMAT,
        "kind": kind,
        "schema": schema,
        "validation_fraction": validation_fraction,
        "tokenizer_sha256": tokenizer.sha256,
        "files": [_describe(file) for file in files],
    }
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:24]
    home = folder or default_folder()
    place = home / key
    if (place / "manifest.json").is_file():
        return TokenStore(place)
    try:
        home.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{key}.making-", dir=home))
    except OSError as error:
        raise ResourceError(
            f"{home}: cannot make the token store here ({error.strerror}); "
            "give another folder with data.store=DIR or the variable MINIMIND_CACHE"
        ) from error
    try:
        bad = BadLines(home / f"{key}.bad-lines.jsonl")
        _fill(work, files, tokenizer, described, bad, max_bad_fraction, progress)
        os.replace(work, place)
    except OSError as error:
        if (place / "manifest.json").is_file():  # somebody else made it in the meantime
            return TokenStore(place)
        raise ResourceError(
            f"{place}: could not write the token store ({error.strerror}); tokens need about "
            f"{sum(file.stat().st_size for file in files):,} bytes. Free some space, or give "
            "another folder with data.store=DIR"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return TokenStore(place)


def _describe(file: Path) -> dict[str, Any]:
    status = file.stat()
    return {
        "path": str(file.resolve()),
        "size": status.st_size,
        "modified_ns": status.st_mtime_ns,
    }


def _fill(
    work: Path,
    files: list[Path],
    tokenizer: Tokenizer,
    described: dict[str, Any],
    bad: BadLines,
    max_bad_fraction: float,
    progress: Callable[[int, int], None],
) -> None:
    """Tokenize `files` into `work`; the manifest comes last."""
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    chat = described["kind"] == "chat"
    writers = {
        split: _Writer(work, split, dtype, with_mask=chat) for split in ("train", "validation")
    }
    limit = int(described["validation_fraction"] * 2**64)
    total, done, skipped = sum(file.stat().st_size for file in files), 0, 0
    for file in files:
        records = read_records([file], schema=described["schema"], bad=bad)
        for batch in _batches(records, _BATCH_RECORDS):
            encoded, fingerprints = _encode(batch, tokenizer, chat)
            skipped += len(batch) - len(encoded)
            for (ids, mask), fingerprint in zip(encoded, fingerprints, strict=True):
                split = "validation" if fingerprint < limit else "train"
                writers[split].add(np.asarray(ids, dtype), np.asarray(mask, np.uint8))
            bad.check(max_bad_fraction)
            progress(done, total)
        done += file.stat().st_size
        progress(done, total)
    bad.check(max_bad_fraction, final=True)
    counts = {split: writer.close() for split, writer in writers.items()}
    if not counts["train"]["documents"] + counts["validation"]["documents"]:
        wanted = "conversations" if chat else "text"
        raise DataError(
            f"{files[0]}{' and others' if len(files) > 1 else ''}: no {wanted} found"
            + (f" ({skipped:,} records of another kind)" if skipped else "")
            + "; `minimind data inspect` shows what the files hold"
        )
    for entry, file in zip(described["files"], files, strict=True):
        with file.open("rb") as stream:
            entry["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
    manifest = described | counts | {"dtype": dtype, "bad_lines": bad.total, "skipped": skipped}
    (work / "manifest.json").write_text(
        json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8"
    )


def _batches(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    iterator = iter(records)
    while batch := list(islice(iterator, size)):
        yield batch


def _encode(
    batch: list[Record], tokenizer: Tokenizer, chat: bool
) -> tuple[list[tuple[list[int], list[int]]], list[int]]:
    """(ids, mask) and a fingerprint for each record of the wanted kind; on all cores."""
    if not chat:
        batch = [record for record in batch if record.text is not None or record.messages]
    else:
        batch = [record for record in batch if record.messages]
    talks = iter(encode_chats(tokenizer, [r.messages for r in batch if r.messages]))
    texts = iter(tokenizer.encode_batch([r.text for r in batch if r.text is not None]))
    encoded: list[tuple[list[int], list[int]]] = []
    for record in batch:
        ids, mask = next(talks) if record.messages else (next(texts), [])
        encoded.append((ids, mask) if chat else ([*ids, tokenizer.end_of_text], []))
    return encoded, [_fingerprint(record) for record in batch]


def _fingerprint(record: Record) -> int:
    """64 bits that depend on the record's text alone."""
    whole = record.text if record.text is not None else json.dumps(record.messages)
    digest = hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


class _Writer:
    """Appends documents to shards of one side."""

    def __init__(self, folder: Path, split: str, dtype: str, *, with_mask: bool) -> None:
        self._folder, self._split, self._dtype = folder, split, dtype
        self._with_mask = with_mask
        self._names: list[str] = []
        self._streams: list[BinaryIO] = []
        self._in_shard = self._tokens = self._documents = 0

    def add(self, ids: NDArray[Any], mask: NDArray[np.uint8]) -> None:
        if not self._streams or self._in_shard >= _SHARD_TOKENS:
            self._open()
        self._in_shard += len(ids)
        self._tokens += len(ids)
        self._documents += 1
        self._streams[0].write(ids.tobytes())
        self._streams[1].write(np.int64(self._in_shard).tobytes())
        if self._with_mask:
            self._streams[2].write(mask.tobytes())

    def _open(self) -> None:
        self._close()
        name = f"{self._split}-{len(self._names):05}"
        endings = ["tokens", "ends"] + (["mask"] if self._with_mask else [])
        self._streams = [(self._folder / f"{name}.{ending}").open("wb") for ending in endings]
        self._names.append(name)
        self._in_shard = 0

    def _close(self) -> None:
        for stream in self._streams:
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
        self._streams = []

    def close(self) -> dict[str, Any]:
        self._close()
        return {"shards": self._names, "tokens": self._tokens, "documents": self._documents}
