"""Language and quality filters. Each document is kept, or dropped for the first reason that holds.

The filters are those of MassiveText and Gopher (Rae et al. 2021, appendix A) where they make sense
for Chinese, with characters in place of words.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from minimind.data.ngrams import window_hashes
from minimind.data.prepare.characters import (
    CHINESE,
    DIGIT,
    LETTER,
    PUNCTUATION,
    SPACE,
    SYMBOL,
    UNREADABLE,
    CodePoints,
)
from minimind.data.prepare.settings import (
    BoilerplateSettings,
    PrepareSettings,
    RepetitionSettings,
)

TOO_SHORT = "too short"
TOO_LONG = "too long"
UNREADABLE_CHARACTERS = "unreadable characters"
LITTLE_CHINESE = "too little Chinese"
MANY_SYMBOLS = "too many symbols"
MUCH_PUNCTUATION = "too much punctuation"
MANY_DIGITS = "too many digits"
DUPLICATE_LINES = "repeated lines"
DUPLICATE_NGRAMS = "repeated phrases"
BOILERPLATE = "boilerplate"
FILTERS = (
    TOO_SHORT,
    TOO_LONG,
    UNREADABLE_CHARACTERS,
    LITTLE_CHINESE,
    MANY_SYMBOLS,
    MUCH_PUNCTUATION,
    MANY_DIGITS,
    DUPLICATE_LINES,
    DUPLICATE_NGRAMS,
    BOILERPLATE,
)
_DOCUMENT_BITS = np.uint64(20)  # a batch has fewer documents


def drop_reasons(
    texts: Sequence[str], points: CodePoints, settings: PrepareSettings
) -> list[str | None]:
    """Return the reason to drop each document of a batch, or None to keep it."""
    counts, letters = points.counts, points.num_letters
    visible = counts.sum(1) - counts[:, SPACE]
    chinese, alphabetic = counts[:, CHINESE], counts[:, CHINESE] + counts[:, LETTER]
    limits, repetition = settings.characters, settings.repetition
    duplicate_ngrams = duplicate_ngram_shares(points, repetition.ngram)
    # --8<-- [start:conditions]
    conditions = {
        TOO_SHORT: (letters < settings.length.minimum) | (letters == 0),
        TOO_LONG: letters > settings.length.maximum,
        UNREADABLE_CHARACTERS: counts[:, UNREADABLE] > limits.max_unreadable * visible,
        LITTLE_CHINESE: chinese < settings.language.min_chinese * alphabetic,
        MANY_SYMBOLS: counts[:, SYMBOL] > limits.max_symbols * visible,
        MUCH_PUNCTUATION: counts[:, PUNCTUATION] > limits.max_punctuation * visible,
        MANY_DIGITS: counts[:, DIGIT] > limits.max_digits * visible,
    }
    # --8<-- [end:conditions]
    choices = [*conditions, ""]
    first = np.full(len(texts), len(conditions))
    for index, condition in reversed(list(enumerate(conditions.values()))):
        first[condition] = index
    reasons: list[str | None] = [choices[index] or None for index in first.tolist()]
    for index, text in enumerate(texts):
        if reasons[index] is None:
            reasons[index] = _reason_in_lines(
                text, float(duplicate_ngrams[index]), repetition, settings.boilerplate
            )
    return reasons


def _reason_in_lines(
    text: str,
    duplicate_ngrams: float,
    repetition: RepetitionSettings,
    boilerplate: BoilerplateSettings,
) -> str | None:
    """Apply the filters that compare lines, which are slower."""
    if duplicate_line_share(text) > repetition.max_duplicate_lines:
        return DUPLICATE_LINES
    if duplicate_ngrams > repetition.max_duplicate_ngrams:
        return DUPLICATE_NGRAMS
    if boilerplate_share(text, boilerplate.phrases) > boilerplate.max_share:
        return BOILERPLATE
    return None


def duplicate_line_share(text: str) -> float:
    """Return the share of characters in lines that repeat an earlier line, without spaces."""
    lines = [line.strip() for line in text.split("\n")]
    if len(lines) == len(set(lines)):
        return 0.0
    repeated, seen = 0, set[str]()
    for line in lines:
        if line in seen:
            repeated += len(line)
        seen.add(line)
    return repeated / max(sum(map(len, lines)), 1)


def duplicate_ngram_shares(points: CodePoints, length: int) -> NDArray[np.float64]:
    """Return [documents] the share of n-grams that repeat an earlier one of the document.

    Overlapping occurrences count: a text of n times the same character has a share near 1.
    """
    num_documents = len(points.ends)
    sizes = np.maximum(points.num_letters - length + 1, 0)
    hashes = window_hashes(points.folded, length)
    # Windows that cross into the next document are left out.
    positions = np.arange(int(sizes.sum())) + np.repeat(
        points.starts - (sizes.cumsum() - sizes), sizes
    )
    owners = np.repeat(np.arange(num_documents, dtype=np.uint64), sizes)
    keys = owners << (np.uint64(64) - _DOCUMENT_BITS) | hashes[positions] >> _DOCUMENT_BITS
    keys.sort()
    repeats = keys[1:][keys[1:] == keys[:-1]] >> (np.uint64(64) - _DOCUMENT_BITS)
    counts = np.bincount(repeats.astype(np.int64), minlength=num_documents)
    return counts / np.maximum(sizes, 1)


def boilerplate_share(text: str, phrases: Sequence[str]) -> float:
    """Return the share of characters in lines that contain a phrase."""
    present = [phrase for phrase in phrases if phrase in text]
    if not present:
        return 0.0
    lines = text.split("\n")
    matching = sum(len(line) for line in lines if any(phrase in line for phrase in present))
    return matching / max(sum(map(len, lines)), 1)
