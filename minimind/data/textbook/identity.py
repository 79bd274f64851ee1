"""Who the model is: dialogues in which it says its name and who made it.

`{{name}}` and `{{author}}` in them stand for what a recipe's data.variables says.
"""

import random
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from minimind.data.textbook.makers import Message
from minimind.data.textbook.quiz import normalise

_TWO_TURNS = 0.25
_BARE = 0.15  # share of questions without their last mark


@dataclass(frozen=True)
class IdentityQuestion:
    """A way of asking that is never trained on; a right answer names each of `keys`."""

    question: str
    about: str
    language: str
    keys: tuple[str, ...]

    def is_right(self, answer: str, fill: Mapping[str, str]) -> bool:
        """Whether the answer says the name, or the author, that `fill` gives."""
        return all(fill[key].lower() in answer.lower() for key in self.keys)


def identity(seed: int) -> Iterator[list[Message]]:
    """Dialogues without end, one or two turns each, every way of asking equally often."""
    rng = random.Random(f"identity {seed}")
    tables = _tables()
    asked = [(topic, question) for topic in tables["topics"] for question in topic["questions"]]
    while True:
        rng.shuffle(asked)
        for topic, question in asked:
            talk = _turn(topic, question, rng)
            if rng.random() < _TWO_TURNS:
                others = [t for t in tables["topics"] if t["language"] == topic["language"]]
                other = rng.choice([t for t in others if t is not topic])
                talk += _turn(other, rng.choice(other["questions"]), rng)
            yield talk


def held_out_identity() -> list[IdentityQuestion]:
    """The ways of asking that `identity` never uses."""
    return [
        IdentityQuestion(question, topic["about"], topic["language"], tuple(topic["keys"]))
        for topic in _tables()["topics"]
        for question in topic["held_out"]
    ]


def _turn(topic: dict[str, Any], question: str, rng: random.Random) -> list[Message]:
    asked = rng.choice(_tables()["frames"][topic["language"]]["before"]) + question
    if rng.random() < _BARE:
        asked = asked.rstrip("？。?.")
    if normalise(asked) in _never():
        asked = question
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": rng.choice(topic["answers"])},
    ]


@cache
def _never() -> frozenset[str]:
    return frozenset(normalise(one.question) for one in held_out_identity())


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
