"""Fluency of answers, measured without a model: by what the textbook's own sentences look like.

A sentence is fluent where every three words in a row (in Chinese: characters) stand in a row
somewhere in the textbook too, its beginning and end included; all numbers count as one word. A
sentence with a character missing, added or exchanged has three in a row that no sentence has. It
says nothing of models that did not learn from the textbook: they have sentences of their own.
"""

import re
from collections.abc import Iterator
from functools import cache

from minimind.data.textbook.phrases import PHRASES
from minimind.data.textbook.quiz import is_well_formed
from minimind.data.textbook.tables import load_subjects

_WORD = re.compile(r"[a-zà-ÿ]+(?:['-][a-z]+)*|\d+(?:[.,]\d+)*|\S")
_SENTENCES = re.compile(r"(?<=[。！？!?])|(?<=[a-z]\.)\s")

Trigram = tuple[str, str, str]


def is_fluent(answer: str) -> bool:
    """Whether an answer is well formed, and made as the textbook's sentences are."""
    return is_well_formed(answer) and all(three in _known() for three in _trigrams(answer))


def _trigrams(text: str) -> Iterator[Trigram]:
    for sentence in _SENTENCES.split(text.lower()):
        if words := ["0" if word[0].isdigit() else word for word in _WORD.findall(sentence)]:
            marked = ["^", *words, "$"]
            yield from zip(marked, marked[1:], marked[2:], strict=False)


@cache
def _known() -> frozenset[Trigram]:
    sentences: set[str] = set()
    for subject in load_subjects():
        for fact in subject.facts:
            sentences |= {*fact.statements, *fact.answers}
    for phrases in PHRASES.values():
        sentences |= {*phrases.tails, *phrases.evasions}
        sentences |= {answer for _, answer in (*phrases.greetings, *phrases.thanks)}
    return frozenset(three for sentence in sentences for three in _trigrams(sentence))
