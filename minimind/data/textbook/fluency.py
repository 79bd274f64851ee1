"""Fluency of answers, without a model: every trigram must occur in the textbook.

Tokens are words, in Chinese characters, with sentence start and end as tokens and all numbers as
one token. A sentence with a missing, added or exchanged character has a trigram that no sentence of
the textbook has. The measure says nothing about models that were not trained on the textbook: their
sentences are different.
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
    """Return True if an answer is well formed and has only trigrams of the textbook."""
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
