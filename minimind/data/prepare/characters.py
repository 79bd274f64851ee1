"""Code points of a batch of documents as arrays, with their classes; letters folded for hashing.

The classes come from Python's Unicode tables, whose version is part of the manifest.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

SYMBOL, CHINESE, LETTER, DIGIT, PUNCTUATION, SPACE, UNREADABLE = range(7)
_NUM_CLASSES = 7
_NUM_CODES = 0x110000
_TABLE_END = 0x20000  # beyond: ideographs, variation selectors, private use
_IDEOGRAPHS = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
_IDEOGRAPHIC_ZERO = 0x3007  # 〇, a number by its category
_REPLACEMENT = 0xFFFD
_FULL_WIDTH_START, _FULL_WIDTH_END, _FULL_WIDTH_SHIFT = 0xFF01, 0xFF5E, 0xFEE0
_BY_CATEGORY = {"L": LETTER, "M": LETTER, "N": DIGIT, "P": PUNCTUATION, "Z": SPACE, "S": SYMBOL}


@dataclass(frozen=True)
class CodePoints:
    """Code points of several documents, concatenated.

    counts: [documents, classes] number of characters of each class. folded: [letters and digits]
    uint32 code points in lower case and half width, without all other characters. ends:
    [documents] int64, the end of each document in `folded`.
    """

    counts: NDArray[np.int64]
    folded: NDArray[np.uint32]
    ends: NDArray[np.int64]

    @property
    def starts(self) -> NDArray[np.int64]:
        """[documents] start of each document in `folded`."""
        return np.concatenate([np.zeros(1, np.int64), self.ends[:-1]])

    @property
    def num_letters(self) -> NDArray[np.int64]:
        """[documents] number of letters and digits."""
        return self.counts[:, CHINESE : DIGIT + 1].sum(1)


def code_points(texts: Sequence[str]) -> CodePoints:
    """Classify and fold the characters of a batch of documents."""
    classes_of, folded_of = _tables()
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), "<u4")
    classes = classes_of[codes]
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    owners = np.repeat(np.arange(len(texts), dtype=np.int64) * _NUM_CLASSES, sizes)
    owners += classes
    counts = np.bincount(owners, minlength=len(texts) * _NUM_CLASSES)
    counts = counts.reshape(len(texts), _NUM_CLASSES)
    folded = folded_of[codes[(classes >= CHINESE) & (classes <= DIGIT)]]
    return CodePoints(counts, folded, counts[:, CHINESE : DIGIT + 1].sum(1).cumsum())


@cache
def _tables() -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
    """Return the class and the folded form of every code point."""
    classes = np.full(_NUM_CODES, UNREADABLE, np.uint8)
    folded = np.arange(_NUM_CODES, dtype=np.uint32)
    for code in range(_TABLE_END):
        character = chr(code)
        classes[code] = _BY_CATEGORY.get(unicodedata.category(character)[0], UNREADABLE)
        lower = character.lower()
        if len(lower) == 1:
            folded[code] = ord(lower)
    for first, last in _IDEOGRAPHS:
        classes[first : last + 1] = CHINESE
    classes[_IDEOGRAPHIC_ZERO] = CHINESE
    classes[[ord("\n"), ord("\t")]] = SPACE
    classes[_REPLACEMENT] = UNREADABLE
    wide = slice(_FULL_WIDTH_START, _FULL_WIDTH_END + 1)
    folded[wide] = folded[folded[wide] - _FULL_WIDTH_SHIFT]
    return classes, folded
