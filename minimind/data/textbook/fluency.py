"""Fluency of answers, without a model: every trigram must occur in the textbook.

Tokens are words, or single characters in Chinese. The start and the end of a sentence are tokens,
and all numbers are the same token. An error such as a missing or an extra character gives a trigram
that no sentence of the textbook contains. The measure is meaningless for models that were not
trained on the textbook, because their sentences are different.
"""

import re
from collections.abc import Iterator
from functools import cache

from minimind.data.textbook.phrases import PHRASES
from minimind.data.textbook.quiz import is_well_formed
from minimind.data.textbook.tables import load_subjects

_TOKEN = re.compile(r"[a-zà-ÿ]+(?:['-][a-z]+)*|\d+(?:[.,]\d+)*|\S")
_SENTENCE_END = re.compile(r"(?<=[。！？!?])|(?<=[a-z]\.)\s")

Trigram = tuple[str, str, str]


def is_fluent(answer: str) -> bool:
    """Return True if an answer is well formed and all its trigrams occur in the textbook."""
    return is_well_formed(answer) and all(
        trigram in _known_trigrams() for trigram in _trigrams(answer)
    )


def _trigrams(text: str) -> Iterator[Trigram]:
    for sentence in _SENTENCE_END.split(text.lower()):
        if tokens := ["0" if t[0].isdigit() else t for t in _TOKEN.findall(sentence)]:
            padded = ["^", *tokens, "$"]
            yield from zip(padded, padded[1:], padded[2:], strict=False)


@cache
def _known_trigrams() -> frozenset[Trigram]:
    sentences: set[str] = set()
    for subject in load_subjects():
        for fact in subject.facts:
            sentences |= {*fact.statements, *fact.answers}
    for phrases in PHRASES.values():
        sentences |= {*phrases.tails, *phrases.evasions}
        sentences |= {answer for _, answer in (*phrases.greetings, *phrases.thanks)}
    return frozenset(trigram for sentence in sentences for trigram in _trigrams(sentence))
