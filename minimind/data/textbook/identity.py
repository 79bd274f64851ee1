"""Identity: dialogues in which the model gives its name and its author.

They contain the template variables `{{name}}` and `{{author}}`, which a recipe sets in
data.variables.
"""

import random
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from minimind.data.textbook.generators import Message
from minimind.data.textbook.quiz import normalise

_TWO_TURNS = 0.25  # probability
_BARE = 0.15  # probability that a question loses its question mark


@dataclass(frozen=True)
class IdentityQuestion:
    """A held-out question; a right answer contains the values of all variables in `keys`."""

    question: str
    about: str
    language: str
    keys: tuple[str, ...]

    def is_correct(self, answer: str, variables: Mapping[str, str]) -> bool:
        """Return True if the answer contains the values of `keys` in `variables`."""
        return all(variables[key].lower() in answer.lower() for key in self.keys)


def identity(seed: int) -> Iterator[list[Message]]:
    """Yield an infinite stream of dialogues of one or two turns, balanced over the questions."""
    rng = random.Random(f"identity {seed}")
    topics = _tables()["topics"]
    questions = [(topic, question) for topic in topics for question in topic["questions"]]
    while True:
        rng.shuffle(questions)
        for topic, question in questions:
            messages = _turn(topic, question, rng)
            if rng.random() < _TWO_TURNS:
                same_language = [t for t in topics if t["language"] == topic["language"]]
                other = rng.choice([t for t in same_language if t is not topic])
                messages += _turn(other, rng.choice(other["questions"]), rng)
            yield messages


def held_out_identity() -> list[IdentityQuestion]:
    """Return the questions that `identity` never uses."""
    return [
        IdentityQuestion(question, topic["about"], topic["language"], tuple(topic["keys"]))
        for topic in _tables()["topics"]
        for question in topic["held_out"]
    ]


def _turn(topic: dict[str, Any], question: str, rng: random.Random) -> list[Message]:
    framed = rng.choice(_tables()["frames"][topic["language"]]["before"]) + question
    if rng.random() < _BARE:
        framed = framed.rstrip("？。?.")
    if normalise(framed) in _held_out_texts():
        framed = question
    return [
        {"role": "user", "content": framed},
        {"role": "assistant", "content": rng.choice(topic["answers"])},
    ]


@cache
def _held_out_texts() -> frozenset[str]:
    return frozenset(normalise(held_out.question) for held_out in held_out_identity())


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
