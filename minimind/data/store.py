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
from itertools import chain
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, TypeVar

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from minimind.data.read import BadLines, batches, list_files, read_records
from minimind.data.schemas import Record, placeholders
from minimind.errors import DataError, ResourceError
from minimind.paths import cache_folder
from minimind.tokenizer import Tokenizer
from minimind.tokenizer.chat import Message, encode_chats, refusal

Kind = Literal["text", "chat", "pairs"]
Split = Literal["train", "validation"]
_RECORDS = {"text": ("text", "messages"), "chat": ("messages",), "pairs": ("pair",)}
_SPLITS: tuple[Split, ...] = ("train", "validation")
_FORMAT = 4
_IDENTITY = ("name", "author")  # what a recipe should fill; other {{words}} may be code
_MOST_UNFILLED = 5
_SHARD_TOKENS = 1 << 27
_PIECE = 1 << 18  # characters
_AT_ONCE = 1 << 20  # characters
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
    A store in the making by another process is waited for; one that is damaged is made again.
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
        "files": [_describe(file) for file in files],
    }
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:24]
    home = folder or default_folder()
    place = home / key
    if store := _open(place):
        _check_filled(path, store)
        return store
    with _lock(home, key, lambda: say(f"waiting for another process that tokenizes {path}")):
        if store := _open(place):
            _check_filled(path, store)
            return store
        if place.exists():
            say(f"the token store {place} is damaged; it is made again")
        store = _make(place, files, tokenizer, described, max_bad_fraction, progress)
    bad_lines, skipped = store.manifest["bad_lines"], store.manifest["skipped"]
    if bad_lines:
        say(f"{path}: {bad_lines:,} bad lines put aside in {store.manifest['bad_lines_file']}")
    if skipped:
        fit = " that fit the model's own chat template" if tokenizer.template else ""
        say(f"{path}: {skipped:,} records left out that are no {_wanted(kind)}{fit}")
    _check_filled(path, store)
    for word in store.manifest["unfilled"]:
        say(_unfilled(path, store, word))
    return store


def _check_filled(path: str, store: TokenStore) -> None:
    """Raise DataError for chats in which a name or an author is left where others are filled."""
    if store.manifest["kind"] == "text" or not store.manifest["fill"]:
        return
    for word in _IDENTITY:
        if word in store.manifest["unfilled"]:
            keys = ", ".join(store.manifest["fill"])
            raise DataError(f"{_unfilled(path, store, word)} (data.fill has {keys})")


def _unfilled(path: str, store: TokenStore, word: str) -> str:
    count = store.manifest["unfilled"][word]
    return (
        f"{path}: {count:,} records hold {{{{{word}}}}}, which nothing fills; "
        f"give data.fill.{word}=…"
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


def _wanted(kind: Kind) -> str:
    return {"text": "text", "chat": "conversations", "pairs": "preference pairs"}[kind]


def _describe(file: Path) -> dict[str, Any]:
    status = file.stat()
    return {
        "path": str(file.resolve()),
        "size": status.st_size,
        "modified_ns": status.st_mtime_ns,
    }


def _open(place: Path) -> TokenStore | None:
    """The store in `place`, if it is there and whole."""
    try:
        return TokenStore(place)
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
        bad = BadLines(bad_lines, max_bad_fraction)
        manifest = described | _fill(work, files, tokenizer, described, bad, meter, progress)
        with (work / "manifest.json").open("w", encoding="utf-8") as stream:
            json.dump(manifest, stream, ensure_ascii=False, indent=1)
            _flush(stream)
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
    bad: BadLines,
    meter: _Meter,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write the tokens of `files` into `work`. What the manifest is to say of them."""
    kind: Kind = described["kind"]
    limit = int(described["validation_fraction"] * 2**64)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    records = read_records(files, schema=described["schema"], bad=bad, progress=meter.add_read)
    skipped, words = 0, Counter[str]()
    progress(0, meter.total)
    with contextlib.ExitStack() as stack:
        writers = {split: stack.enter_context(_Writer(work, split, kind)) for split in _SPLITS}
        encode = partial(_encode, tokenizer=tokenizer, kind=kind, dtype=dtype, limit=limit)
        filled = _filled(records, described["fill"], words)
        marked = ((batch, meter.read) for batch in batches(filled))
        for documents, num_skipped, done in _ahead(encode, marked):
            skipped += num_skipped
            meter.done = done
            for split, writer in writers.items():
                meter.written += writer.add(documents[split])
            progress(done, meter.total)
    progress(meter.total, meter.total)
    bad.check(bad.max_fraction, final=True)
    counts = {split: writer.counts for split, writer in writers.items()}
    if not any(count["documents"] for count in counts.values()):
        raise DataError(
            f"{files[0]}{' and others' if len(files) > 1 else ''}: no {_wanted(kind)} found"
            + (f" ({skipped:,} records of another kind)" if skipped else "")
            + (", each with chosen and rejected answers" if kind == "pairs" else "")
            + "; `minimind data inspect` shows what the files hold"
            + _refused(files, tokenizer, described["schema"])
        )
    return counts | {
        "dtype": dtype,
        "files": [
            _hashed(file, entry) for file, entry in zip(files, described["files"], strict=True)
        ],
        "bad_lines": bad.total,
        "bad_lines_file": str(bad.path) if bad.total else None,
        "skipped": skipped,
        "filled": sorted(words.keys() & described["fill"].keys()),
        "unfilled": _left(words, kind, described["fill"]),
    }


def _refused(files: list[Path], tokenizer: Tokenizer, schema: str) -> str:
    """Why the first conversation does not fit the chat format of a model made elsewhere, if so."""
    records = read_records(files, schema=schema, bad=BadLines())
    first = next((talk for record in records for talk in _conversations(record)), None)
    reason = first and refusal(tokenizer, first)
    return f". The first conversation: {reason}" if reason else ""


def _filled(
    records: Iterable[Record], fill: Mapping[str, str], words: "Counter[str]"
) -> Iterator[Record]:
    """The records, filled; in how many of them each `{{word}}` stood is counted on the way."""
    for record in records:
        found = {word for text in record.texts for word in placeholders(text)}
        words.update(found)
        yield record.filled(fill) if found else record


def _hashed(file: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """The entry of a source with its sum. Raises DataError when it is not what was read."""
    try:
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        if _describe(file) == entry:
            return entry | {"sha256": sha256}
    except OSError:
        pass
    raise DataError(f"{file}: it has changed while it was read; start again when it is finished")


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
) -> tuple[dict[Split, _Documents], int, int]:
    """The documents of each side, how many records are of another kind, and the batch's mark."""
    batch, mark = marked
    wanted = [
        record
        for record in batch
        if record.kind in _RECORDS[kind]
        and not any(refusal(tokenizer, talk) for talk in _conversations(record))
    ]
    talks = [(talk, record.num_shared) for record in wanted for talk in _conversations(record)]
    given = [number for _, number in talks]
    chats = iter(encode_chats(tokenizer, [talk for talk, _ in talks], given=given))
    texts = (record.text for record in wanted if record.text is not None)
    pieces = encode_pieces(chain.from_iterable(map(split_long, texts)), tokenizer)
    code = {"uint16": "H", "uint32": "I"}[dtype]
    sides: dict[Split, _Documents] = {split: _Documents(array(code)) for split in _SPLITS}
    for record in wanted:
        documents = sides["validation" if record.split_key() < limit else "train"]
        start = len(documents.tokens)
        for _ in _conversations(record):
            ids, mask = next(chats)
            documents.tokens.fromlist(ids)
            documents.mask.fromlist(mask)
            if kind != "text":
                documents.lengths.append(len(ids))
        if record.text is not None:
            documents.tokens.fromlist(tokenizer.text_start)
        for _ in split_long(record.text or ""):
            documents.tokens.fromlist(next(pieces))
        if kind == "text":
            documents.tokens.append(tokenizer.end_of_text)
            documents.lengths.append(len(documents.tokens) - start)
        for text in record.texts:
            documents.characters += len(text)
            documents.num_bytes += len(text.encode("utf-8", "surrogatepass"))
    return sides, len(batch) - len(wanted), mark


def _conversations(record: Record) -> list[list[Message]]:
    """Those of one record: one, of a pair two, of running text none."""
    return [side for side in (record.messages, record.chosen, record.rejected) if side is not None]


def split_long(text: str) -> Iterator[str]:
    """A long text in parts, cut after a line where there is one; nothing of an empty one.

    The tokenizer takes a hundred bytes of memory for each of text, so a book is not encoded at
    once. At a cut the tokens may be others than without it, of the same text.
    """
    start = 0
    while start < len(text):
        end = start + _PIECE
        if end < len(text):
            end = text.rfind("\n", start + _PIECE // 2, end) + 1 or end
        yield text[start:end]
        start = end


def encode_pieces(pieces: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Ids of each piece, a bounded number at once."""
    group: list[str] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece)
        if size >= _AT_ONCE:
            yield from tokenizer.encode_batch(group)
            group, size = [], 0
    yield from tokenizer.encode_batch(group)


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
