"""Search for questions that occur word for word in documents.

A question is found in a document if any of its n-grams occurs there. An n-gram is 24 characters of
Chinese text or 13 words of other text (Brown et al. 2020, appendix C); case, punctuation and spaces
are ignored. A shorter question must occur in full. Questions of fewer than 12 characters or 7 words
are skipped, because they occur by coincidence.

The search compares hashes of all n-grams (Rabin-Karp), then the n-grams themselves. The index takes
about 16 bytes per n-gram, and 16 MB for each length of n-grams.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BASE = np.uint64(0x9E3779B97F4A7C15)  # of the polynomial hash: odd, with well-mixed bits
_TABLE_BITS = np.uint64(24)
_SHIFT = np.uint64(64) - _TABLE_BITS
_WORDS = re.compile(r"[^\W_]+")
_BOUNDARY = 0  # between two documents; also the id of words that occur in no question

Units = NDArray[np.uint32]  # code points or word ids


@dataclass(frozen=True)
class _NGrams:
    """The length of an n-gram and the minimum length of a question, in units."""

    length: int
    minimum: int


_CHARACTERS, _ENGLISH_WORDS = _NGrams(24, 12), _NGrams(13, 7)


class QuestionIndex:
    """Questions (id to text) to search for. too_short: ids of questions that were skipped."""

    def __init__(self, questions: Mapping[str, str]) -> None:
        self.too_short: set[str] = set()
        vocabulary = _Vocabulary()
        chinese, english = _Searcher(_CHARACTERS), _Searcher(_ENGLISH_WORDS)
        for name, text in questions.items():
            if _is_chinese(text):
                added = chinese.add(name, _characters(_normalize(text)))
            else:
                added = english.add(name, vocabulary.add(_normalize(text)))
            if not added:
                self.too_short.add(name)
        self._searchers: list[tuple[_Searcher, Callable[[str], Units]]] = [
            (searcher, units_of)
            for searcher, units_of in ((chinese, _characters), (english, vocabulary.units))
            if searcher.has_questions
        ]

    def search(self, documents: Sequence[str]) -> Iterator[tuple[int, str]]:
        """Yield (index of the document, id of a question in it), possibly several times."""
        if not self._searchers:
            return
        normalized = list(map(_normalize, documents))
        for searcher, units_of in self._searchers:
            units = list(map(units_of, normalized))
            # The boundary belongs to the document before it; no n-gram contains one.
            ends = np.cumsum([len(document) + 1 for document in units])
            joined = np.full(int(ends[-1]), _BOUNDARY, np.uint32)
            for document, end in zip(units, ends.tolist(), strict=True):
                joined[end - 1 - len(document) : end - 1] = document
            for position, name in searcher.search(joined):
                yield int(np.searchsorted(ends, position, "right")), name


def window_hashes(units: NDArray[np.unsignedinteger], length: int) -> NDArray[np.uint64]:
    """Return the polynomial hash, modulo 2^64, of each window of `length` units.

    The upper bits are well mixed, the lower ones are not. For windows of twice the length,
    h2[i] = h[i] * base^length + h[i + length].
    """
    count = max(len(units) - length + 1, 0)
    hashes = np.zeros(count, np.uint64)
    for offset in range(length):
        hashes *= _BASE
        hashes += units[offset : offset + count]
    hashes *= _BASE
    return hashes


def _is_chinese(text: str) -> bool:
    return sum("\u4e00" <= c <= "\u9fff" for c in text) * 5 > sum(c.isalnum() for c in text)


def _normalize(text: str) -> str:
    """Convert a text to NFKC, which makes full-width letters ASCII, and to lower case."""
    return unicodedata.normalize("NFKC", text).lower()


def _characters(text: str) -> Units:
    """Return the code points of letters and digits of a normalized text."""
    joined = "".join(_WORDS.findall(text))
    return np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), "<u4")


class _Vocabulary:
    """Ids of the words in the questions; all other words have the id 0."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def add(self, text: str) -> Units:
        """Assign ids to the words of a normalized question and return them."""
        for word in _WORDS.findall(text):
            self._ids.setdefault(word, len(self._ids) + 1)
        return self.units(text)

    def units(self, text: str) -> Units:
        """Return the ids of the words of a normalized text."""
        id_of = self._ids.get
        return np.array([id_of(word, _BOUNDARY) for word in _WORDS.findall(text)], np.uint32)


class _Searcher:
    """Search for the n-grams of questions in one kind of units.

    A question that is shorter than an n-gram is indexed by the hash of its first `minimum` units,
    and compared in full.
    """

    def __init__(self, ngrams: _NGrams) -> None:
        self._ngrams = ngrams
        self._tables = {length: _Table(length) for length in (ngrams.length, ngrams.minimum)}

    @property
    def has_questions(self) -> bool:
        """True if there is anything to search for."""
        return any(table.questions for table in self._tables.values())

    def add(self, name: str, units: Units) -> bool:
        """Add a question; return False if it is too short."""
        if len(units) < self._ngrams.minimum:
            return False
        is_short = len(units) < self._ngrams.length
        length = self._ngrams.minimum if is_short else self._ngrams.length
        self._tables[length].questions.append((name, units, is_short))
        return True

    def search(self, units: Units) -> Iterator[tuple[int, str]]:
        """Yield (position, id of the question) for each n-gram of a question in `units`."""
        for table in self._tables.values():
            if table.questions:
                yield from table.search(units)


class _Table:
    """The n-grams of one length: their hashes, sorted, each with its question and position.

    questions: id, units, and True if the question must occur in full.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.questions: list[tuple[str, Units, bool]] = []
        self._size = 0  # number of questions when the arrays were built

    def _build(self) -> None:
        hashes, owners, positions = [], [], []
        for index, (_, units, is_short) in enumerate(self.questions):
            of_question = window_hashes(units, self.length)[: 1 if is_short else None]
            hashes.append(of_question)
            owners.append(np.full(len(of_question), index, np.uint32))
            positions.append(np.arange(len(of_question), dtype=np.uint32))
        self._hashes = np.concatenate(hashes)
        order = np.argsort(self._hashes, kind="stable")
        self._hashes = self._hashes[order]
        self._owners = np.concatenate(owners)[order]
        self._positions = np.concatenate(positions)[order]
        self._has_top_bits = np.zeros(1 << int(_TABLE_BITS), bool)
        self._has_top_bits[self._hashes >> _SHIFT] = True
        self._size = len(self.questions)

    def search(self, units: Units) -> Iterator[tuple[int, str]]:
        if self._size != len(self.questions):
            self._build()
        if len(units) < self.length:
            return
        hashes = window_hashes(units, self.length)
        starts = np.flatnonzero(self._has_top_bits[hashes >> _SHIFT])
        firsts = np.searchsorted(self._hashes, hashes[starts])
        lasts = np.searchsorted(self._hashes, hashes[starts], "right")
        found = np.flatnonzero(lasts > firsts)
        for start, first, last in zip(
            starts[found].tolist(), firsts[found].tolist(), lasts[found].tolist(), strict=True
        ):
            for entry in range(first, last):
                name, question, is_short = self.questions[self._owners[entry]]
                begin = int(self._positions[entry])
                ngram = question if is_short else question[begin : begin + self.length]
                if np.array_equal(units[start : start + len(ngram)], ngram):
                    yield start, name
