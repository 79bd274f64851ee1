"""Token stores: text tokenized once, kept on disk, read through memory maps.

    <folder>/<key>.lock             held by the process that builds the store
             <key>.invalid.jsonl    the first invalid records of the input (quarantine)
             <key>.tmp-…/           a store being built; left behind only by a killed process
             <key>/manifest.json    inputs and counts; written last
                   train-00000.tokens  token ids, uint16 (uint32 for vocabularies over 65,536)
                   train-00000.mask    loss mask, uint8, 1 for supervised tokens; not for text
                   train-00000.ends    int64, end of each document
                   validation-…        the documents of the validation split

A preference pair is two documents: the chosen conversation, then the rejected one.

There is one store per source of a mixture. The split of a document depends only on its text, not
on the order of files. So all duplicates of a document, and all pairs of a prompt, are in the same
split.

A store is valid if the SHA-256 hashes of its input files are those in the manifest. So it stays
valid for copies of the files in another folder. Hashing 100 GB takes minutes, so a file is hashed
again only if its size, modification time, change time or inode differs from the recorded stamp. A
file that was modified less than two seconds before it was hashed has no stamp, because a later
write could have the same times. The change time cannot be set by a program. Windows has none, so
there all files are hashed at every start.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from minimind.data.encode import Kind as Kind
from minimind.data.input_files import list_files
from minimind.data.invalid import too_many
from minimind.data.locations import Location
from minimind.data.stamps import settled_stamp_of, sha256_of, stamp_of
from minimind.data.store_manifest import (
    FORMAT_VERSION,
    IDENTITY_VARIABLES,
    MANIFEST,
    SPLITS,
    invalid_records_file,
    write_manifest,
)
from minimind.data.store_manifest import Split as Split
from minimind.data.store_writer import OTHER_FOLDER, build_store
from minimind.errors import DataError, ResourceError
from minimind.paths import cache_folder
from minimind.tokenizer import Tokenizer

_MAX_KEYS_SHOWN = 8
# Entries of a manifest that, together with the files, identify a store.
_IDENTITY = ("format", "kind", "schema", "variables", "validation_fraction", "tokenizer_sha256")


@dataclass(frozen=True)
class Shard:
    """Tokens of many documents, memory-mapped.

    tokens: [n] ids. mask: [n] uint8 loss mask, None for text. ends: [documents] end of each
    document in `tokens`.
    """

    tokens: NDArray[Any]
    mask: NDArray[np.uint8] | None
    ends: NDArray[np.int64]


class TokenStore:
    """A finished store on disk. Raises ValueError or OSError when it is incomplete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))
        for name, size in self._sizes():
            if (folder / name).stat().st_size != size:
                raise ValueError(f"{name} does not have the {size:,} bytes that were written")

    def _sizes(self) -> Iterator[tuple[str, int]]:
        """Yield the name and the size in bytes of each file."""
        width = np.dtype(self.manifest["dtype"]).itemsize
        for split in SPLITS:
            for shard in self.manifest[split]["shards"]:
                yield f"{shard['name']}.tokens", shard["tokens"] * width
                yield f"{shard['name']}.ends", shard["documents"] * 8
                if self.manifest["kind"] != "text":
                    yield f"{shard['name']}.mask", shard["tokens"]

    def shards(self, split: Split) -> list[Shard]:
        """Map the shards of one split into memory."""
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

    def unigram_counts(self, vocab_size: int, max_tokens: int = 1 << 24) -> NDArray[np.int64]:
        """Return [vocab_size] counts of each token in the training split.

        At most the first `max_tokens` of each shard (134M tokens) are counted.
        """
        counts = np.zeros(vocab_size, np.int64)
        for shard in self.shards("train"):
            counts += np.bincount(shard.tokens[:max_tokens], minlength=vocab_size)
        return counts


def _map(path: Path, dtype: str) -> NDArray[Any]:
    if path.stat().st_size == 0:  # mmap does not support empty files
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def default_folder() -> Path:
    """Return the folder of token stores: `stores` in the cache folder."""
    return cache_folder() / "stores"


def open_store(
    path: str,
    tokenizer: Tokenizer,
    *,
    kind: Kind,
    schema: str = "auto",
    variables: Mapping[str, str] | None = None,
    validation_fraction: float = 0.0,
    max_invalid_fraction: float = 0.05,
    folder: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> TokenStore:
    """Open the token store of `path` (a file, folder or glob); build it if necessary.

    `variables` are the values of template variables `{{variable}}` in the records. If another
    process is building the store, wait for it. A store that is damaged, or whose input files have
    changed, is rebuilt. `progress(done, total)` is called with bytes of input, `say(text)` with
    messages for the user. Raises DataError when the input cannot be read or has too many invalid
    records, also if the store was built when more were allowed, and ResourceError when the store
    cannot be written.
    """
    files = list_files(path)
    spec = store_spec(files, tokenizer, kind, schema, variables or {}, validation_fraction)
    key = store_key(spec)
    home = folder or default_folder()
    target = home / key
    if not target.exists():
        target = _store_of_copies(home, spec, files) or target
    store, built = _open(target), False
    if store is None or not _is_unchanged(store, files):
        store = None if os.access(home, os.W_OK) else _open_verified(target, files)
    if store is None:
        with _lock(home, key, lambda: say(f"waiting for another process that tokenizes {path}")):
            store = _open_verified(target, files)
            if store is None:
                if _open(target):
                    say(f"{path} has changed since it was tokenized; tokenizing it again")
                elif target.exists():
                    say(f"the token store {target} is damaged; building it again")
                build_store(target, files, tokenizer, spec, max_invalid_fraction, progress)
                store, built = TokenStore(target), True
    _check_invalid_records(store, max_invalid_fraction)
    _report_skipped(path, store, say)
    _check_identity_variables(path, store)
    if built:
        for name in store.manifest["unsubstituted"]:
            say(_unsubstituted_notice(path, store, name))
    _report_unused_keys(path, store, say)
    return store


def store_spec(
    files: Sequence[Location],
    tokenizer: Tokenizer,
    kind: Kind,
    schema: str,
    variables: Mapping[str, str],
    validation_fraction: float,
) -> dict[str, Any]:
    """Return the entries of a manifest that identify a store."""
    return {
        "format": FORMAT_VERSION,
        "kind": kind,
        "schema": schema,
        "variables": dict(variables),
        "validation_fraction": validation_fraction,
        "tokenizer_sha256": tokenizer.sha256,
        "files": [{"path": str(file.resolve()), "size": file.stat().st_size} for file in files],
    }


def store_key(spec: Mapping[str, Any]) -> str:
    """Return the name of the folder of a store."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:24]


# --- Lookup and verification


def _open(folder: Path) -> TokenStore | None:
    """Return the store in `folder`; None if it is missing or damaged."""
    try:
        return TokenStore(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_unchanged(store: TokenStore, files: list[Path]) -> bool:
    """Return True if the stamps of all input files match the manifest."""
    entries = store.manifest["files"]
    return all(stamp_of(f) == entry["stamp"] for f, entry in zip(files, entries, strict=True))


def _open_verified(folder: Path, files: list[Path]) -> TokenStore | None:
    """Return the store in `folder` if it is intact and the hashes of its input files match.

    If the folder is writable, the stamps are updated, so that the next start need not hash the
    files.
    """
    store = _open(folder)
    if store is None or _is_unchanged(store, files):
        return store
    for file, entry in zip(files, store.manifest["files"], strict=True):
        if entry["stamp"] != stamp_of(file):
            if sha256_of(file) != entry["sha256"]:
                return None
            entry["stamp"] = settled_stamp_of(file)
    with contextlib.suppress(OSError):
        write_manifest(folder, store.manifest)
    return store


def _store_of_copies(home: Path, spec: Mapping[str, Any], files: list[Path]) -> Path | None:
    """Return the store of files that were copied or moved to their present folder, if any.

    So `minimind data prepare` can run on one machine, or write to a URL, and training on another.
    """
    wanted = _without_folders(spec)
    for folder in sorted(path.parent for path in home.glob(f"*/{MANIFEST}")):
        store = _open(folder)
        if store and _without_folders(store.manifest) == wanted and _open_verified(folder, files):
            return folder
    return None


def _without_folders(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that identify a store, with the names of the files in place of paths."""
    names = [(re.split(r"[/\\]", entry["path"])[-1], entry["size"]) for entry in manifest["files"]]
    return {name: manifest.get(name) for name in _IDENTITY} | {"files": names}


@contextlib.contextmanager
def _lock(home: Path, key: str, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a store; the operating system releases it if the process dies."""
    lock = FileLock(home / f"{key}.lock")
    try:
        home.mkdir(parents=True, exist_ok=True)
        _remove_stale(home)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            lock.acquire()
    except OSError as error:
        raise ResourceError(
            f"{home}: cannot create the token store here ({error.strerror}); {OTHER_FOLDER}"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _remove_stale(home: Path) -> None:
    """Remove the temporary folders of processes that have died."""
    for temporary in home.glob("*.tmp-*"):
        key = temporary.name.partition(".")[0]
        with contextlib.suppress(Timeout, OSError), FileLock(home / f"{key}.lock", timeout=0):
            shutil.rmtree(temporary)


# --- Notices for the user


def _check_invalid_records(store: TokenStore, max_fraction: float) -> None:
    """Raise DataError if a store, which may have been built when more were allowed, lacks too many.

    Stores of earlier versions do not have the number of valid records; they are not checked.
    """
    valid, invalid = store.manifest.get("valid_records"), store.manifest["invalid_records"]
    if valid is not None and invalid > max_fraction * (valid + invalid):
        summary = store.manifest["invalid_summary"]
        raise too_many(summary, invalid, invalid_records_file(store.folder))


def _report_skipped(path: str, store: TokenStore, say: Callable[[str], None]) -> None:
    """Report which records of the input a store does not contain."""
    manifest = store.manifest
    if manifest["invalid_records"]:
        file = invalid_records_file(store.folder)
        say(f"{manifest['invalid_summary']}. They are left out; see {file}")
    for reason, count in manifest["skipped"].items():
        say(f"{path}: skipped {count:,} of {manifest['records']:,} records: {reason}")


def _report_unused_keys(path: str, store: TokenStore, say: Callable[[str], None]) -> None:
    """Report the keys of records that training does not use, in one line."""
    keys = store.manifest["unused_keys"]
    if keys:
        first = list(keys.items())[:_MAX_KEYS_SHOWN]
        shown = ", ".join(f"{key} ({count:,})" for key, count in first)
        rest = len(keys) - _MAX_KEYS_SHOWN
        more = f" and {rest} more, listed by `minimind data inspect`" if rest > 0 else ""
        say(f"{path}: unused keys of records: {shown}{more}")


def _check_identity_variables(path: str, store: TokenStore) -> None:
    """Raise DataError if conversations use `{{name}}` or `{{author}}` without a value.

    If no variables are set, `{{name}}` may be intended as plain text.
    """
    if store.manifest["kind"] == "text" or not store.manifest["variables"]:
        return
    for name in IDENTITY_VARIABLES:
        if name in store.manifest["unsubstituted"]:
            keys = ", ".join(store.manifest["variables"])
            raise DataError(
                f"{_unsubstituted_notice(path, store, name)} (data.variables has {keys})"
            )


def _unsubstituted_notice(path: str, store: TokenStore, name: str) -> str:
    count, records = store.manifest["unsubstituted"][name], store.manifest["records"]
    return (
        f"{path}: {count:,} of {records:,} records contain {{{{{name}}}}}, which has no value; "
        f"set data.variables.{name}=…"
    )
