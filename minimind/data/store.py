"""The token store: text tokenized once, kept on disk, read through memory maps.

    <folder>/<key>.lock               held by the process that makes the store
             <key>.bad-lines.jsonl    the first lines of the input that were no records
             <key>.making-…/          a store in the making; left only by a process that died
             <key>/manifest.json      what it was made from, counts; written last
                   train-00000.tokens token ids, uint16 (uint32 for vocabularies over 65,536)
                   train-00000.mask   not of text: uint8, 1 where the model is to produce the token
                   train-00000.ends   int64, where each document ends
                   validation-…       the documents held out

A preference pair is two documents, the chosen conversation and then the rejected one.

A store holds one part of a mix. Which documents are held out depends on their text alone, so it
is the same in any order of files, and copies of one document stay on one side; so do the pairs
of one prompt.

A store is valid for the contents of its input files, by SHA-256. Hashing 100 GB takes minutes, so
a file is only hashed again when its size, modification time, change time or inode differs from
those noted when it was last hashed, or when it was younger than two seconds then (a later write
could leave the same times). The change time cannot be set back. Windows has none, so there each
start hashes all files.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, TypeVar

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from minimind.data.encode import WANTED, encode_records, reason_to_skip
from minimind.data.encode import Kind as Kind
from minimind.data.read import InvalidRecords, batches, list_files, read_records
from minimind.data.schemas import Record, count_unused, variables_in
from minimind.data.stamps import settled_stamp_of, sha256_of, stamp_of
from minimind.errors import DataError, ResourceError
from minimind.paths import cache_folder
from minimind.tokenizer import Tokenizer
from minimind.tokenizer.chat import unsupported_reason

Split = Literal["train", "validation"]
_SPLITS: tuple[Split, ...] = ("train", "validation")
_FORMAT = 5
_IDENTITY = ("name", "author")  # what a recipe should fill; other {{words}} may be code
_MOST_UNFILLED = 5
_SHARD_TOKENS = 1 << 27
_KEYS_SHOWN = 8
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_ELSEWHERE = "give another folder with data.store=DIR or the variable MINIMIND_CACHE"


@dataclass(frozen=True)
class Shard:
    """Tokens of some documents, memory-mapped.

    tokens: [n] ids; mask: [n] or None; ends: [documents] where each document ends.
    """

    tokens: NDArray[Any]
    mask: NDArray[np.uint8] | None
    ends: NDArray[np.int64]


class TokenStore:
    """A finished store on disk. Raises ValueError or OSError when it is not whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text("utf-8"))
        for name, size in self._sizes():
            if (folder / name).stat().st_size != size:
                raise ValueError(f"{name} has not the {size:,} bytes that it was written with")

    def _sizes(self) -> Iterator[tuple[str, int]]:
        """Name and bytes of each file."""
        width = np.dtype(self.manifest["dtype"]).itemsize
        for split in _SPLITS:
            for shard in self.manifest[split]["shards"]:
                yield f"{shard['name']}.tokens", shard["tokens"] * width
                yield f"{shard['name']}.ends", shard["documents"] * 8
                if self.manifest["kind"] != "text":
                    yield f"{shard['name']}.mask", shard["tokens"]

    def shards(self, split: Split) -> list[Shard]:
        """The shards of one side, as memory maps."""
        return [
            Shard(
                tokens=_map(self.folder / f"{shard['name']}.tokens", self.manifest["dtype"]),
                mask=_map(self.folder / f"{shard['name']}.mask", "uint8")
                if self.manifest["kind"] != "text"
                else None,
                ends=_map(self.folder / f"{shard['name']}.ends", "int64"),
            )
            for shard in self.manifest[split]["shards"]
        ]

    def unigram_counts(self, vocab_size: int, most: int = 1 << 24) -> NDArray[np.int64]:
        """[vocab_size] how often each token occurs in the training side.

        Of each shard (134M tokens) at most the first `most` are counted.
        """
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
    return cache_folder() / "stores"


def open_store(
    path: str,
    tokenizer: Tokenizer,
    *,
    kind: Kind,
    schema: str = "auto",
    fill: Mapping[str, str] | None = None,
    validation_fraction: float = 0.0,
    max_bad_fraction: float = 0.05,
    folder: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> TokenStore:
    """Find the token store of `path` (file, folder or glob), or make it, on all cores.

    `fill` says what stands in the place of each `{{key}}` in the records.
    A store in the making by another process is waited for; one that is damaged, or whose input has
    changed, is made again.
    `progress(done, total)` is called with bytes of input, `say(text)` with what a user should
    know. Raises DataError when the input cannot be read or has too many bad lines, and
    ResourceError when the store cannot be written.
    """
    files = list_files(path)
    described = {
        "format": _FORMAT,
        "kind": kind,
        "schema": schema,
        "fill": dict(fill or {}),
        "validation_fraction": validation_fraction,
        "tokenizer_sha256": tokenizer.sha256,
        "files": [{"path": str(file.resolve()), "size": file.stat().st_size} for file in files],
    }
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:24]
    home = folder or default_folder()
    place = home / key
    store, made = _open(place), False
    if store is None or not _is_unchanged(store, files):
        store = None if os.access(home, os.W_OK) else _verified(place, files)
    if store is None:
        with _lock(home, key, lambda: say(f"waiting for another process that tokenizes {path}")):
            store = _verified(place, files)
            if store is None:
                if _open(place):
                    say(f"{path} has changed since it was tokenized; it is tokenized again")
                elif place.exists():
                    say(f"the token store {place} is damaged; it is made again")
                store = _make(place, files, tokenizer, described, max_bad_fraction, progress)
                made = True
    if made:
        _report_left_out(path, store, say)
    _check_filled(path, store)
    if made:
        for word in store.manifest["unfilled"]:
            say(_unfilled(path, store, word))
    _report_unused(path, store, say)
    return store


def _report_left_out(path: str, store: TokenStore, say: Callable[[str], None]) -> None:
    """Say what of the input is not in a store that was just made."""
    manifest = store.manifest
    if manifest["bad_lines"]:
        say(f"{path}: invalid lines: {manifest['bad_lines']:,}, see {manifest['bad_lines_file']}")
    for reason, count in manifest["skipped"].items():
        say(f"{path}: left out {count:,} of {manifest['records']:,} records: {reason}")


def _report_unused(path: str, store: TokenStore, say: Callable[[str], None]) -> None:
    """Say in one line which keys of the records training does not use."""
    keys = store.manifest["unused_keys"]
    if keys:
        shown = ", ".join(f"{key} ({count:,})" for key, count in list(keys.items())[:_KEYS_SHOWN])
        rest = len(keys) - _KEYS_SHOWN
        more = f" and {rest} more, which `minimind data inspect` lists" if rest > 0 else ""
        say(f"{path}: keys of records that are not used: {shown}{more}")


def _check_filled(path: str, store: TokenStore) -> None:
    """Raise DataError for chats in which a name or an author is left where others are filled."""
    if store.manifest["kind"] == "text" or not store.manifest["fill"]:
        return
    for word in _IDENTITY:
        if word in store.manifest["unfilled"]:
            keys = ", ".join(store.manifest["fill"])
            raise DataError(f"{_unfilled(path, store, word)} (data.variables has {keys})")


def _unfilled(path: str, store: TokenStore, word: str) -> str:
    count, records = store.manifest["unfilled"][word], store.manifest["records"]
    return (
        f"{path}: nothing fills {{{{{word}}}}}, which is in {count:,} of {records:,} records; "
        f"give data.variables.{word}=…"
    )


def _left(words: "Counter[str]", kind: Kind, fill: Mapping[str, str]) -> dict[str, int]:
    """In how many records each `{{word}}` is left: a name, an author, the most frequent others.

    Others are of interest in chats that are filled; elsewhere they are code.
    """
    others = bool(fill) and kind != "text"
    left = [word for word, _ in words.most_common() if word not in fill]
    left = [word for word in left if others or word in _IDENTITY]
    first = sorted(left, key=lambda word: word not in _IDENTITY)[:_MOST_UNFILLED]
    return {word: words[word] for word in first}


def _open(place: Path) -> TokenStore | None:
    """The store in `place`, if it is there and whole."""
    try:
        return TokenStore(place)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_unchanged(store: TokenStore, files: list[Path]) -> bool:
    """Whether the files are, by their stamps alone, those that the store was made from."""
    entries = store.manifest["files"]
    return all(stamp_of(f) == entry["stamp"] for f, entry in zip(files, entries, strict=True))


def _verified(place: Path, files: list[Path]) -> TokenStore | None:
    """The store in `place` if it is whole and the files have the contents it was made from.

    Stamps are noted anew, where the folder may be written to, so that the files need not be hashed
    each time.
    """
    store = _open(place)
    if store is None or _is_unchanged(store, files):
        return store
    for file, entry in zip(files, store.manifest["files"], strict=True):
        if entry["stamp"] != stamp_of(file):
            if sha256_of(file) != entry["sha256"]:
                return None
            entry["stamp"] = settled_stamp_of(file)
    with contextlib.suppress(OSError):
        _write_manifest(place, store.manifest)
    return store


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    making = folder / f"manifest.json.{os.getpid()}"
    try:
        with making.open("w", encoding="utf-8") as stream:
            json.dump(manifest, stream, ensure_ascii=False, indent=1)
            _flush(stream)
        os.replace(making, folder / "manifest.json")
    finally:
        making.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(home: Path, key: str, on_wait: Callable[[], None]) -> Iterator[None]:
    """Be the only process that makes the store `key`; the system frees the lock of a dead one."""
    lock = FileLock(home / f"{key}.lock")
    try:
        home.mkdir(parents=True, exist_ok=True)
        _sweep(home)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            lock.acquire()
    except OSError as error:
        raise ResourceError(
            f"{home}: cannot make the token store here ({error.strerror}); {_ELSEWHERE}"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _sweep(home: Path) -> None:
    """Remove the stores in the making whose makers have died."""
    for work in home.glob("*.making-*"):
        key = work.name.partition(".")[0]
        with contextlib.suppress(Timeout, OSError), FileLock(home / f"{key}.lock", timeout=0):
            shutil.rmtree(work)


@dataclass
class _Meter:
    """Bytes of input: all, read, and done with; bytes of tokens written."""

    total: int
    read: int = 0
    done: int = 0
    written: int = 0

    def add_read(self, num_bytes: int) -> None:
        self.read += num_bytes

    def needed(self) -> int:
        """Bytes that the whole store will take, as far as can be told by now."""
        return self.written * self.total // self.done if self.done else self.total


def _make(
    place: Path,
    files: list[Path],
    tokenizer: Tokenizer,
    described: dict[str, Any],
    max_bad_fraction: float,
    progress: Callable[[int, int], None],
) -> TokenStore:
    """Make the store in a folder beside `place`, and move it there when it is whole."""
    meter = _Meter(sum(entry["size"] for entry in described["files"]))
    bad_lines = place.with_name(f"{place.name}.bad-lines.jsonl")
    work = place  # until there is another
    try:
        bad_lines.unlink(missing_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f"{place.name}.making-", dir=place.parent))
        bad = InvalidRecords(bad_lines, max_bad_fraction)
        manifest = described | _fill(work, files, tokenizer, described, bad, meter, progress)
        _write_manifest(work, manifest)
        os.replace(work, place)
        return TokenStore(place)
    except BrokenPipeError:  # nobody looks at the progress any more
        raise
    except OSError as error:
        raise ResourceError(
            f"{place}: cannot write the token store ({error.strerror}). It takes about "
            f"{meter.needed():,} bytes; {shutil.disk_usage(place.parent).free:,} are free. "
            f"Free some space, or {_ELSEWHERE}"
        ) from error
    finally:
        if work != place:
            shutil.rmtree(work, ignore_errors=True)


def _fill(
    work: Path,
    files: list[Path],
    tokenizer: Tokenizer,
    described: dict[str, Any],
    bad: InvalidRecords,
    meter: _Meter,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write the tokens of `files` into `work`. What the manifest is to say of them."""
    kind: Kind = described["kind"]
    limit = int(described["validation_fraction"] * 2**64)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    before = [stamp_of(file) for file in files]
    records = read_records(files, schema=described["schema"], bad=bad, progress=meter.add_read)
    skipped, words, unused = Counter[str](), Counter[str](), Counter[str]()
    num_records = 0
    progress(0, meter.total)
    with contextlib.ExitStack() as stack:
        writers = {split: stack.enter_context(_Writer(work, split, kind)) for split in _SPLITS}
        encode = partial(_encode, tokenizer=tokenizer, kind=kind, dtype=dtype, limit=limit)
        filled = _filled(records, described["fill"], words, unused)
        marked = ((batch, meter.read) for batch in batches(filled))
        for documents, num_skipped, size, done in _ahead(encode, marked):
            skipped += num_skipped
            num_records += size
            meter.done = done
            for split, writer in writers.items():
                meter.written += writer.add(documents[split])
            progress(done, meter.total)
    progress(meter.total, meter.total)
    bad.check(bad.max_fraction, final=True)
    counts = {split: writer.counts for split, writer in writers.items()}
    if not any(count["documents"] for count in counts.values()):
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common())
        raise DataError(
            f"{files[0]}{' and others' if len(files) > 1 else ''}: no {WANTED[kind]} found"
            + (f" (records left out: {left_out})" if skipped else "")
            + (", each with chosen and rejected answers" if kind == "pairs" else "")
            + "; `minimind data inspect` shows what the files hold"
            + _refused(files, tokenizer, described["schema"])
        )
    return counts | {
        "dtype": dtype,
        "files": [
            _source(file, entry, stamp)
            for file, entry, stamp in zip(files, described["files"], before, strict=True)
        ],
        "records": num_records,
        "bad_lines": bad.total,
        "bad_lines_file": str(bad.path) if bad.total else None,
        "skipped": dict(skipped.most_common()),
        "unused_keys": dict(unused.most_common()),
        "filled": sorted(words.keys() & described["fill"].keys()),
        "unfilled": _left(words, kind, described["fill"]),
    }


def _refused(files: list[Path], tokenizer: Tokenizer, schema: str) -> str:
    """Why the first conversation does not fit the chat format of a model made elsewhere, if so."""
    records = read_records(files, schema=schema, bad=InvalidRecords())
    first = next((talk for record in records for talk, _ in record.conversations), None)
    reason = first and unsupported_reason(tokenizer, first)
    return f". The first conversation: {reason}" if reason else ""


def _filled(
    records: Iterable[Record],
    fill: Mapping[str, str],
    words: "Counter[str]",
    unused: "Counter[str]",
) -> Iterator[Record]:
    """The records, filled; on the way counts in how many a `{{word}}` or an unused key is."""
    for record in records:
        count_unused(unused, record)
        found = {word for text in record.texts for word in variables_in(text)}
        words.update(found)
        yield record.filled(fill) if found else record


def _source(file: Path, entry: dict[str, Any], before: list[int]) -> dict[str, Any]:
    """The entry of a file with its hash. Raises DataError when it is not what was read."""
    sha256 = sha256_of(file)
    if stamp_of(file) != before:
        raise DataError(
            f"{file}: it has changed while it was read; start again when it is finished"
        )
    return entry | {"sha256": sha256, "stamp": settled_stamp_of(file)}


def _ahead(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """`map`, at work in another thread while results are used and items are made."""
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
    """Documents of one side: their tokens end to end, and the length of each."""

    tokens: "array[int]"  # quoted: Python 3.11 cannot run it
    mask: "array[int]" = field(default_factory=lambda: array("B"))
    lengths: list[int] = field(default_factory=list)
    characters: int = 0
    num_bytes: int = 0


def _encode(
    marked: tuple[list[Record], int], *, tokenizer: Tokenizer, kind: Kind, dtype: str, limit: int
) -> tuple[dict[Split, _Documents], "Counter[str]", int, int]:
    """The documents of each side, how many records are left out and why, the number of records,
    and the batch's mark."""
    batch, mark = marked
    skipped = Counter[str]()
    wanted = []
    for record in batch:
        if reason := reason_to_skip(record, tokenizer, kind):
            skipped[reason] += 1
        else:
            wanted.append(record)
    code = {"uint16": "H", "uint32": "I"}[dtype]
    sides: dict[Split, _Documents] = {split: _Documents(array(code)) for split in _SPLITS}
    for record, encoded in zip(wanted, encode_records(wanted, tokenizer, kind), strict=True):
        documents = sides["validation" if record.split_key() < limit else "train"]
        for ids, mask in encoded:
            documents.tokens.fromlist(ids)
            documents.mask.fromlist(mask)
            documents.lengths.append(len(ids))
        for text in record.texts:
            documents.characters += len(text)
            documents.num_bytes += len(text.encode("utf-8", "surrogatepass"))
    return sides, skipped, len(batch), mark


class _Writer:
    """Appends documents to shards of one side."""

    def __init__(self, folder: Path, split: Split, kind: Kind) -> None:
        self._folder, self._split = folder, split
        self._endings = ("tokens", "ends", "mask") if kind != "text" else ("tokens", "ends")
        self._streams: list[BinaryIO] = []
        self._shards: list[dict[str, Any]] = []
        self._characters = self._num_bytes = 0

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._close()
        finally:
            for stream in self._streams:
                with contextlib.suppress(OSError):  # the disk is full, which is known by now
                    stream.close()

    def add(self, documents: _Documents) -> int:
        """Append the documents; how many bytes that takes."""
        if not documents.lengths:
            return 0
        if not self._shards or self._shards[-1]["tokens"] >= _SHARD_TOKENS:
            self._open()
        shard = self._shards[-1]
        ends = shard["tokens"] + np.cumsum(documents.lengths, dtype=np.int64)
        parts = [documents.tokens, ends, documents.mask]
        shard["tokens"] = int(ends[-1])
        shard["documents"] += len(ends)
        self._characters += documents.characters
        self._num_bytes += documents.num_bytes
        return sum(s.write(part) for s, part in zip(self._streams, parts, strict=False))

    def _open(self) -> None:
        self._close()
        name = f"{self._split}-{len(self._shards):05}"
        self._streams = [(self._folder / f"{name}.{e}").open("wb") for e in self._endings]
        self._shards.append({"name": name, "tokens": 0, "documents": 0})

    def _close(self) -> None:
        for stream in self._streams:
            _flush(stream)
            stream.close()

    @property
    def counts(self) -> dict[str, Any]:
        """What the manifest says of this side."""
        return {
            "tokens": sum(shard["tokens"] for shard in self._shards),
            "documents": sum(shard["documents"] for shard in self._shards),
            "characters": self._characters,
            "bytes": self._num_bytes,
            "shards": self._shards,
        }


def _flush(stream: IO[Any]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
