"""Contamination: benchmark questions that occur word for word in training data.

A question is contaminated if any of its n-grams occurs in the data. An n-gram is 24 characters of
Chinese text or 13 words of other text (Brown et al. 2020, appendix C); case, punctuation and spaces
are ignored. A shorter question must occur in full. Questions of fewer than 12 characters or 7 words
are skipped, because they occur by coincidence. The data is read once, in blocks; memory use is
proportional to the size of the questions.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from minimind.data.input_files import list_files
from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_texts

_BASE = numpy.uint64(0x9E3779B97F4A7C15)  # of the polynomial hash: odd, with well-mixed bits
_TABLE_BITS = numpy.uint64(24)
_SHIFT = numpy.uint64(64) - _TABLE_BITS
_BLOCK_CHARACTERS = 1 << 20
_WORDS = re.compile(r"[^\W_]+")
_BOUNDARY = 0  # between two documents; also the id of words that occur in no question

Units = NDArray[numpy.uint32]  # code points or word ids


@dataclass(frozen=True)
class _NGrams:
    """The length of an n-gram and the minimum length of a question, in units."""

    length: int
    minimum: int


_CHARACTERS, _ENGLISH_WORDS = _NGrams(24, 12), _NGrams(13, 7)


@dataclass
class Contamination:
    """Questions found in data.

    found: the file, by question id. too_short: ids of questions that were skipped.
    """

    found: dict[str, str] = field(default_factory=dict)
    too_short: set[str] = field(default_factory=set)
    characters: int = 0
    invalid_records: int = 0

    def with_prefix(self, prefix: str) -> "Contamination":
        """Return the questions whose ids start with a prefix, with the prefix removed."""
        return Contamination(
            {n.removeprefix(prefix): f for n, f in self.found.items() if n.startswith(prefix)},
            {n.removeprefix(prefix) for n in self.too_short if n.startswith(prefix)},
            self.characters,
            self.invalid_records,
        )

    def metrics(self) -> dict[str, Any]:
        """Return the metrics as JSON."""
        return {
            "found": len(self.found),
            "too_short": len(self.too_short),
            "characters": self.characters,
            "invalid_records": self.invalid_records,
            "questions": self.found,
        }


def find_contamination(
    questions: Mapping[str, str],
    data: Sequence[str],
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> Contamination:
    """Search all records of the data (files, folders, globs) for questions (id to text).

    Raises DataError if the data cannot be read.
    """
    result = Contamination()
    vocabulary = _Vocabulary()
    chinese, english = _Searcher(_CHARACTERS), _Searcher(_ENGLISH_WORDS)
    for name, text in questions.items():
        if _is_chinese(text):
            added = chinese.add(name, _characters(text))
        else:
            added = english.add(name, vocabulary.add(text))
        if not added:
            result.too_short.add(name)
    invalid = InvalidRecords()
    for path in data:
        for file in list_files(path):
            for text in _blocks(read_texts([file], invalid=invalid, progress=progress)):
                result.characters += len(text)
                for searcher, units_of in ((chinese, _characters), (english, vocabulary.units)):
                    if searcher.has_questions:
                        for name in searcher.search(units_of(text)):
                            result.found.setdefault(name, str(file))
    result.invalid_records = invalid.total
    return result


def _blocks(texts: Iterator[str]) -> Iterator[str]:
    """Join short documents to blocks, separated by NUL."""
    block: list[str] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= _BLOCK_CHARACTERS:
            yield "\0".join(block)
            block, size = [], 0
    if block:
        yield "\0".join(block)


def _is_chinese(text: str) -> bool:
    return sum("\u4e00" <= c <= "\u9fff" for c in text) * 5 > sum(c.isalnum() for c in text)


def _normalize(text: str) -> str:
    """Convert a text to NFKC, which makes full-width letters ASCII, and to lower case."""
    return unicodedata.normalize("NFKC", text).lower()


def _characters(text: str) -> Units:
    """Return the code points of letters and digits; NUL separates documents."""
    joined = "\0".join("".join(_WORDS.findall(part)) for part in _normalize(text).split("\0"))
    return numpy.frombuffer(joined.encode("utf-32-le", "surrogatepass"), numpy.uint32)


class _Vocabulary:
    """Ids of the words in the questions; all other words have the id 0."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def add(self, text: str) -> Units:
        """Assign ids to the words of a question and return them."""
        for word in _WORDS.findall(_normalize(text)):
            self._ids.setdefault(word, len(self._ids) + 1)
        return self.units(text)

    def units(self, text: str) -> Units:
        """Return the ids of the words of a text."""
        id_of = self._ids.get
        ids: list[int] = []
        for part in _normalize(text).split("\0"):
            ids += [id_of(word, _BOUNDARY) for word in _WORDS.findall(part)]
            ids.append(_BOUNDARY)
        return numpy.array(ids[:-1], numpy.uint32)


class _Searcher:
    """Search for n-grams by hash (Rabin-Karp); candidates are compared exactly.

    An n-gram is indexed by the hash of all its units. A question that is shorter than an n-gram is
    indexed by the hash of its first `minimum` units.
    """

    def __init__(self, ngrams: _NGrams) -> None:
        self._ngrams = ngrams
        self._by_hash: dict[int, dict[int, list[tuple[bytes, str]]]] = {
            length: defaultdict(list) for length in (ngrams.length, ngrams.minimum)
        }
        self._tables: dict[int, NDArray[numpy.bool_]] = {}
        self._found: set[str] = set()

    @property
    def has_questions(self) -> bool:
        """True if there is anything to search for."""
        return any(self._by_hash.values())

    def add(self, name: str, units: Units) -> bool:
        """Add a question; return False if it is too short."""
        size = len(units)
        if size < self._ngrams.minimum:
            return False
        if size < self._ngrams.length:  # must occur in full
            length = self._ngrams.minimum
            first = int(_hashes(units, length)[0])
            self._by_hash[length][first].append((units.tobytes(), name))
        else:
            length = self._ngrams.length
            for start, value in enumerate(_hashes(units, length).tolist()):
                ngram = units[start : start + length].tobytes()
                self._by_hash[length][value].append((ngram, name))
        self._tables.pop(length, None)
        return True

    def search(self, units: Units) -> Iterator[str]:
        """Yield the ids of questions in a text that were not found before."""
        for length, by_hash in self._by_hash.items():
            if not by_hash or len(units) < length:
                continue
            hashes = _hashes(units, length)
            for start in numpy.flatnonzero(self._table(length)[hashes >> _SHIFT]).tolist():
                for ngram, name in by_hash.get(int(hashes[start]), ()):
                    if name not in self._found:
                        end = start + len(ngram) // units.itemsize
                        if units[start:end].tobytes() == ngram:
                            self._found.add(name)
                            yield name

    def _table(self, length: int) -> NDArray[numpy.bool_]:
        """Return a filter indexed by the top bits of a hash: True if an n-gram has them."""
        if length not in self._tables:
            table = numpy.zeros(1 << int(_TABLE_BITS), bool)
            keys = numpy.fromiter(self._by_hash[length], numpy.uint64)
            table[keys >> _SHIFT] = True
            self._tables[length] = table
        return self._tables[length]


def _hashes(units: Units, length: int) -> NDArray[numpy.uint64]:
    """Return the polynomial hash, modulo 2^64, of each n-gram of `length` units."""
    count = len(units) - length + 1
    hashes = numpy.zeros(count, numpy.uint64)
    for offset in range(length):
        hashes *= _BASE
        hashes += units[offset : offset + count]
    return hashes * _BASE


def files_size(data: Sequence[str]) -> int:
    """Return the total size of the data's files in bytes."""
    return sum(Path(file).stat().st_size for path in data for file in list_files(path))
