"""Endless streams made from the tables: prose, dialogues, preference pairs, exam questions.

Every stream goes through all facts in shuffled passes, so that each is seen equally often, and is
the same for the same seed. No question of the quiz is ever in one.
"""

import random
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import Literal

from minimind.data.textbook.phrases import PHRASES, Phrases
from minimind.data.textbook.quiz import normalise
from minimind.data.textbook.tables import Fact, Relation, Subject, load_subjects, placeholders
from minimind.errors import DataError

Message = dict[str, str]
Turn = tuple[str, Fact]  # what the user says, and the fact that answers it
Subjects = Sequence[Subject] | None

_ASKED_IN_PROSE = 0.25
_BY_RELATION = 0.2  # share of prose that goes along a column instead of along an entity
_PRONOUN = 0.3
_FRAMED = 0.35
_UNMARKED = 0.1
_WITH_TAIL = 0.04
_WITH_SYSTEM = 0.04
_GREETED = 0.08
_MAX_TURNS = 4
_STOPS = "。？！.?!"


def prose(seed: int, subjects: Subjects = None) -> Iterator[str]:
    """Short texts of some sentences about an entity, or about several side by side."""
    rng = random.Random(f"prose {seed}")
    book = _book(subjects)
    while True:
        documents = [text for subject in book for text in _documents(subject, rng)]
        rng.shuffle(documents)
        yield from documents


def dialogues(
    seed: int, turns: Literal["single", "multi"] = "single", subjects: Subjects = None
) -> Iterator[list[Message]]:
    """Conversations of one question, or of two to four, of which a later needs an earlier."""
    rng = random.Random(f"{turns} {seed}")
    make = _single if turns == "single" else _Talk(_book(subjects), rng).about
    for fact in _passes(_facts(_book(subjects), with_opener=turns == "multi"), rng):
        said = make(fact) if turns == "multi" else [(_ask(fact, rng), fact)]
        yield _conversation(said, rng)
