"""Which questions of an exam stand in training data, word for word.

A question is there when any window of it is: 24 characters of Chinese, 13 words of English (Brown
et al. 2020, appendix C), after case, punctuation and spaces are taken away. One that is shorter
must be there as a whole; one of fewer than 12 characters or 7 words says too little, and is not
looked for. The data is read once, a piece at a time; what is held in memory is the questions'.
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

_BASE = numpy.uint64(0x9E3779B97F4A7C15)  # odd, with bits all over
_TABLE_BITS = numpy.uint64(24)
_SHIFT = numpy.uint64(64) - _TABLE_BITS
_PIECE = 1 << 20  # characters that are looked through at once
_WORDS = re.compile(r"[^\W_]+")
_BETWEEN_DOCUMENTS = 0

Units = NDArray[numpy.uint32]


@dataclass(frozen=True)
class _Kind:
    """How long a window is, and the least that is looked for."""

    window: int
    least: int


_CHARACTERS, _ENGLISH_WORDS = _Kind(24, 12), _Kind(13, 7)


@dataclass
class Contamination:
    """found: for each question that was, the file. too_short: ids that were not looked for."""

    found: dict[str, str] = field(default_factory=dict)
    too_short: set[str] = field(default_factory=set)
    characters: int = 0
    bad_lines: int = 0

    def part(self, prefix: str) -> "Contamination":
        """Of the questions whose names begin so, under the rest of their names."""
        return Contamination(
            {n.removeprefix(prefix): f for n, f in self.found.items() if n.startswith(prefix)},
            {n.removeprefix(prefix) for n in self.too_short if n.startswith(prefix)},
            self.characters,
            self.bad_lines,
        )

    def metrics(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "found": len(self.found),
            "too_short": len(self.too_short),
            "characters": self.characters,
            "bad_lines": self.bad_lines,
            "questions": self.found,
        }


def find_contamination(
    questions: Mapping[str, str],
    data: Sequence[str],
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> Contamination:
    """Look for the questions (id to text) in all records of the data (files, folders, globs).

    Raises DataError for data that cannot be read.
    """
    result = Contamination()
    words = _Vocabulary()
    chinese, english = _Finder(_CHARACTERS), _Finder(_ENGLISH_WORDS)
    for name, text in questions.items():
        finder = chinese if _is_chinese(text) else english
        units = _characters(text) if finder is chinese else words.learn(text)
        if not finder.add(name, units):
            result.too_short.add(name)
    bad = InvalidRecords()
    for path in data:
        for file in list_files(path):
            for text in _pieces(read_texts([file], invalid=bad, progress=progress)):
                result.characters += len(text)
                for finder, units_of in ((chinese, _characters), (english, words.units)):
                    if finder.waits:
                        for name in finder.look_through(units_of(text)):
                            result.found.setdefault(name, str(file))
    result.bad_lines = bad.total
    return result


def _pieces(texts: Iterator[str]) -> Iterator[str]:
    """Documents, many together where they are short; a NUL stands between two."""
    waiting: list[str] = []
    size = 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        if size >= _PIECE:
            yield "\0".join(waiting)
            waiting, size = [], 0
    if waiting:
        yield "\0".join(waiting)


def _is_chinese(text: str) -> bool:
    return sum("\u4e00" <= c <= "\u9fff" for c in text) * 5 > sum(c.isalnum() for c in text)


def _plain(text: str) -> str:
    """Wide letters and digits made narrow, in lower case."""
    return unicodedata.normalize("NFKC", text).lower()


def _characters(text: str) -> Units:
    kept = "\0".join("".join(_WORDS.findall(part)) for part in _plain(text).split("\0"))
    return numpy.frombuffer(kept.encode("utf-32-le", "surrogatepass"), numpy.uint32)


class _Vocabulary:
    """The words of the questions by number; all others are the same to it."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def learn(self, text: str) -> Units:
        for word in _WORDS.findall(_plain(text)):
            self._numbers.setdefault(word, len(self._numbers) + 1)
        return self.units(text)

    def units(self, text: str) -> Units:
        number = self._numbers.get
        numbers: list[int] = []
        for part in _plain(text).split("\0"):
            numbers += [number(word, _BETWEEN_DOCUMENTS) for word in _WORDS.findall(part)]
            numbers.append(_BETWEEN_DOCUMENTS)
        return numpy.array(numbers[:-1], numpy.uint32)


class _Finder:
    """Looks for windows by hashes of their beginnings, and compares what has the same hash."""

    def __init__(self, kind: _Kind) -> None:
        self._kind = kind
        self._windows: dict[int, dict[int, list[tuple[bytes, str]]]] = {
            length: defaultdict(list) for length in (kind.window, kind.least)
        }
        self._tables: dict[int, NDArray[numpy.bool_]] = {}
        self._found: set[str] = set()

    @property
    def waits(self) -> bool:
        """Whether there is anything to look for."""
        return any(self._windows.values())

    def add(self, name: str, units: Units) -> bool:
        """Look for a question; False when it is too short."""
        size = len(units)
        if size < self._kind.least:
            return False
        hashed = self._kind.window if size >= self._kind.window else self._kind.least
        hashes = _hashes(units, hashed).tolist()
        if size < self._kind.window:  # as a whole
            self._windows[hashed][hashes[0]].append((units.tobytes(), name))
        else:
            for start, value in enumerate(hashes):
                window = units[start : start + hashed].tobytes()
                self._windows[hashed][value].append((window, name))
        self._tables.pop(hashed, None)
        return True

    def look_through(self, units: Units) -> Iterator[str]:
        """Names of the questions that are there and were not found before."""
        for length, windows in self._windows.items():
            if not windows or len(units) < length:
                continue
            hashes = _hashes(units, length)
            for start in numpy.flatnonzero(self._table(length)[hashes >> _SHIFT]).tolist():
                for window, name in windows.get(int(hashes[start]), ()):
                    if name not in self._found:
                        end = start + len(window) // units.itemsize
                        if units[start:end].tobytes() == window:
                            self._found.add(name)
                            yield name

    def _table(self, length: int) -> NDArray[numpy.bool_]:
        """Which first bits of a hash are worth a closer look."""
        if length not in self._tables:
            table = numpy.zeros(1 << int(_TABLE_BITS), bool)
            keys = numpy.fromiter(self._windows[length], numpy.uint64)
            table[keys >> _SHIFT] = True
            self._tables[length] = table
        return self._tables[length]


def _hashes(units: Units, length: int) -> NDArray[numpy.uint64]:
    """Of each window of `length` units: a polynomial over 64 bits, which wraps around."""
    count = len(units) - length + 1
    hashes = numpy.zeros(count, numpy.uint64)
    for place in range(length):
        hashes *= _BASE
        hashes += units[place : place + count]
    return hashes * _BASE


def files_size(data: Sequence[str]) -> int:
    """Bytes of all files that the data means."""
    return sum(Path(file).stat().st_size for path in data for file in list_files(path))
