"""The stages as functions of (input files, settings) to (output files, counts).

read     an input file to shards of texts
filter   a shard to a shard of normalized texts that pass the filters, and their keys
match    the keys of one band, in one range, to edges between equal keys
cluster  all edges to an action for each document
write    a shard and its actions to a shard of the output, and its tokens

Each writes its files atomically and returns a JSON object that is kept as the marker of the task.
A function depends on nothing but its arguments, so it runs in any process on any machine.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from minimind.data.invalid import InvalidRecords
from minimind.data.locations import Location, new_files, remove
from minimind.data.ngrams import QuestionIndex
from minimind.data.prepare.characters import code_points
from minimind.data.prepare.duplicates import (
    EXACT,
    KEEP,
    NEAR,
    KeyFile,
    actions,
    cluster_sizes,
    connect,
    find_edges,
    sample_near,
    sort_keys,
)
from minimind.data.prepare.filters import TOO_SHORT, drop_reasons
from minimind.data.prepare.minhash import band_keys, exact_keys
from minimind.data.prepare.normalize import normalize
from minimind.data.prepare.progress import ProgressFile, progress_file
from minimind.data.prepare.settings import PrepareSettings
from minimind.data.prepare.shards import (
    OUTPUT_LEVEL,
    WORK_LEVEL,
    Samples,
    TextWriter,
    read_array,
    read_elements,
    read_shard,
    text_batches,
    write_array,
    write_texts,
)
from minimind.data.read import read_records
from minimind.data.schemas import Record
from minimind.data.stamps import settled_stamp_of, sha256_of, stamp_of
from minimind.data.store_writer import PartWriter
from minimind.errors import DataError
from minimind.files import read_json_object
from minimind.tokenizer import Tokenizer

NO_TEXT = "not running text"
CONTAMINATED = "benchmark question"
EXACT_COPY = "exact duplicate"
NEAR_COPY = "near-duplicate"
Result = dict[str, Any]
_NUM_SAMPLES, _NUM_PAIRS = 5, 200
_EXCERPT, _PAIR_EXCERPT = 200, 600  # characters
_INVALID_ADVICE = (
    "Fix the file (`minimind data inspect` shows its contents), leave it out, or allow more with "
    "max_invalid_fraction=…; then choose another --out"
)


class _Counts:
    """Numbers of documents and characters by reason to drop them, with samples."""

    def __init__(self) -> None:
        self._documents, self._characters = Counter[str](), Counter[str]()
        self._samples = new_samples()

    def add(self, reason: str, text: str) -> None:
        self._documents[reason] += 1
        self._characters[reason] += len(text)
        self._samples.add(reason, text)

    def result(self) -> Result:
        return {
            "dropped": dict(self._documents),
            "dropped_characters": dict(self._characters),
            "samples": self._samples.by_reason,
        }


def new_samples() -> Samples:
    """Return an empty sample of dropped documents."""
    return Samples(_NUM_SAMPLES, lambda text: text[:_EXCERPT], {})


def read_file(
    file: Location, number: int, folder: Location, quarantine: Location, settings: Result
) -> Result:
    """Split an input file into shards `folder/NUMBER-SHARD.jsonl.zst`. Raises DataError."""
    limits = PrepareSettings(**settings)
    stamp, sha256 = stamp_of(file), sha256_of(file)
    if isinstance(quarantine, Path):
        quarantine.parent.mkdir(parents=True, exist_ok=True)
        quarantine.unlink(missing_ok=True)  # of an interrupted try
    invalid = InvalidRecords(quarantine, limits.max_invalid_fraction, advice=_INVALID_ADVICE)
    dropped = _Counts()
    progress = ProgressFile(progress_file(folder, number))
    records = read_records([file], invalid=invalid, progress=progress.add)
    try:
        shards = _write_shards(_running_texts(records, dropped), number, folder, limits.shard_mb)
        invalid.check(invalid.max_fraction, final=True)
    finally:
        invalid.save()
    if stamp_of(file) != stamp:
        raise DataError(
            f"{file}: the file changed while it was read; start again when it is complete"
        )
    return {
        "input": {"sha256": sha256, "stamp": settled_stamp_of(file)},
        "invalid": {"records": invalid.total, "reasons": dict(invalid.reasons)},
        "shards": shards,
        **dropped.result(),
    }


def _write_shards(
    texts: Iterator[str], number: int, folder: Location, shard_mb: int
) -> list[Result]:
    shards: list[Result] = []
    first = next(texts, None)
    while first is not None:
        path = folder / f"{number:05}-{len(shards):05}.jsonl.zst"
        with write_texts(path, WORK_LEVEL) as writer:
            writer.write(first)
            while writer.bytes < shard_mb * 1_000_000:
                text = next(texts, None)
                if text is None:
                    break
                writer.write(text)
        shards.append(_shard_result(writer))
        first = next(texts, None)
    return shards


def _running_texts(records: Iterable[Record], dropped: _Counts) -> Iterator[str]:
    """Yield the texts of records of running text; count the others as dropped."""
    for record in records:
        if record.text is None:
            dropped.add(NO_TEXT, record.as_text())
        else:
            yield record.text


def _shard_result(writer: TextWriter) -> Result:
    return {
        **writer.entry,
        "documents": writer.documents,
        "characters": writer.characters,
        "text_bytes": writer.bytes,
    }


def filter_shard(
    shard: Location, folder: Location, settings: Result, questions: tuple[Location, str] | None
) -> Result:
    """Normalize and filter a shard, drop documents with benchmark questions, compute keys.

    questions: a JSON file (id to text) and its SHA-256. The outputs in `folder` are the texts that
    remain, and the sorted keys: band 0 is the exact key, the others are those of MinHash.
    """
    limits = PrepareSettings(**settings)
    index = _question_index(*questions) if questions else None
    dropped, keys, lengths = _Counts(), [], _LengthCounts()
    with write_texts(folder / shard.name, WORK_LEVEL) as writer:
        for batch in text_batches(read_shard(shard)):
            lengths.add("before", batch)
            texts = list(filter(None, map(normalize, batch)))
            for raw in batch if len(texts) < len(batch) else ():
                if not normalize(raw):
                    dropped.add(TOO_SHORT, raw)
            if not texts:
                continue
            points = code_points(texts)
            reasons = drop_reasons(texts, points, limits)
            if index:
                passed = [
                    "" if reason else text for text, reason in zip(texts, reasons, strict=True)
                ]
                for document, _ in index.search(passed):
                    reasons[document] = CONTAMINATED
            for text, reason in zip(texts, reasons, strict=True):
                if reason is None:
                    writer.write(text)
                else:
                    dropped.add(reason, text)
            keep = np.array([reason is None for reason in reasons])
            exact = exact_keys(points)
            bands = band_keys(points, exact, limits.near_duplicates)
            keys.append(np.concatenate([exact[None], bands])[:, keep])
    num_bands = limits.near_duplicates.bands + 1
    sorted_keys, rows = sort_keys(
        np.concatenate([np.empty((num_bands, 0), np.uint64), *keys], axis=1)
    )
    stem = shard.name.partition(".")[0]
    return {
        **_shard_result(writer),
        "keys": write_array(folder / f"{stem}.keys.npy", sorted_keys),
        "rows": write_array(folder / f"{stem}.rows.npy", rows),
        "lengths": lengths.counts,
        **dropped.result(),
    }


@cache
def _question_index(path: Location, sha256: str) -> QuestionIndex:
    """Build the index once in each process. sha256: of the file, so that a change is noticed."""
    return QuestionIndex(read_json_object(path))


class _LengthCounts:
    """Number of documents by length in characters, rounded down to a power of two."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = {}

    def add(self, name: str, texts: list[str]) -> None:
        counts = self.counts.setdefault(name, {})
        for bits, count in Counter(len(text).bit_length() - 1 for text in texts if text).items():
            key = str(1 << bits)
            counts[key] = counts.get(key, 0) + count


def match_range(
    files: list[KeyFile], band: int, part: int, num_parts: int, output: Location
) -> Result:
    """Find documents with equal keys of one band, in one range of keys."""
    edges = find_edges(files, band, part, num_parts)
    return {**write_array(output, edges), "edges": edges.shape[1]}


def cluster(
    num_documents: int, exact_edges: list[Location], near_edges: list[Location], folder: Location
) -> Result:
    """Decide for each document if it is kept; sample near-duplicates."""
    roots = connect(num_documents, map(read_array, chain(exact_edges, near_edges)))
    decided = actions(roots, map(read_array, exact_edges))
    return {
        "actions": write_array(folder / "actions.npy", decided),
        "pairs": sample_near(decided, roots, _NUM_PAIRS),
        "cluster_sizes": cluster_sizes(roots, decided),
    }


def write_shard(
    shard: Location,
    decided: tuple[Location, int, int],
    wanted: list[int],
    output: Location,
    tokens: tuple[Path, str, int, Location, float] | None,
) -> Result:
    """Write the documents of a shard that are kept; tokenize them if a tokenizer is given.

    decided: file of actions, id of the first document, number of documents. wanted: documents whose
    text is returned, by position in the shard. tokens: tokenizer, its SHA-256, number of the
    part, folder of the store, validation fraction. An output without documents is not written.
    """
    path, first_id, num_documents = decided
    all_actions = read_elements(path, start=first_id, count=num_documents).tolist()
    samples = set(wanted)
    dropped, lengths, excerpts = _Counts(), _LengthCounts(), {}
    reason_of = {EXACT: EXACT_COPY, NEAR: NEAR_COPY}
    position = 0
    with _token_writer(tokens) as token_writer, write_texts(output, OUTPUT_LEVEL) as writer:
        for batch in text_batches(read_shard(shard)):
            of_batch = all_actions[position : position + len(batch)]
            kept = []
            for text, action in zip(batch, of_batch, strict=True):
                if position in samples:
                    excerpts[str(first_id + position)] = text[:_PAIR_EXCERPT]
                if action == KEEP:
                    writer.write(text)
                    kept.append(text)
                else:
                    dropped.add(reason_of[action], text)
                position += 1
            lengths.add("after", kept)
            if token_writer and kept:
                token_writer.add(kept)
    result: Result = {
        **_shard_result(writer),
        "lengths": lengths.counts,
        "excerpts": excerpts,
        **dropped.result(),
    }
    if not writer.documents:
        remove([output])
    elif token_writer:
        result["tokens"] = token_writer.result()
    return result


@contextlib.contextmanager
def _token_writer(
    tokens: tuple[Path, str, int, Location, float] | None,
) -> Iterator[PartWriter | None]:
    if tokens is None:
        yield None
        return
    path, sha256, number, store, fraction = tokens
    with (
        new_files(store) as folder,
        PartWriter(folder, number, _tokenizer(path, sha256), fraction) as writer,
    ):
        yield writer


@cache
def _tokenizer(folder: Path, sha256: str) -> Tokenizer:
    """Load it once in each process. sha256: of the tokenizer, so that a change is noticed."""
    return Tokenizer.load(folder)
