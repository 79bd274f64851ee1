"""What models are asked: each task reads its items, has a model deal with them, and adds up.

A result is a JSON object with the item's `id`; one that has an `error` gave none, and is tried
again when an evaluation goes on.
"""

import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from minimind.data.invalid import InvalidRecords
from minimind.errors import MinimindError
from minimind.evaluation.encoding import PromptEncoder
from minimind.evaluation.scoring import Row, Scorer
from minimind.evaluation.statistics import wilson_interval

Result = dict[str, Any]
T = TypeVar("T")
R = TypeVar("R")
MAX_CONSECUTIVE_ERRORS = 10  # one after the other; then it is not the questions


@dataclass(frozen=True)
class GenerationConfig:
    """How answers are written; temperature 0 takes the likeliest word each time.

    at_once: how many questions are answered together, at the most.
    """

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    at_once: int = 64

    top_p = 0.9  # as in `minimind chat`

    def seed_of(self, question: str) -> int:
        """A question's own, wherever it stands among others."""
        return (self.seed + zlib.crc32(question.encode("utf-8", "replace"))) % 2**32


@dataclass(frozen=True)
class Answer:
    """What a model wrote. Its length in tokens, and whether it came to its end, where it is known.

    seconds: since the answer before it came, or since the first question was asked.
    """

    text: str
    tokens: int | None = None
    ended: bool | None = None
    seconds: float = 0.0


class Model(Protocol):
    """Something to examine. A service has no scorer; asking for it raises UsageError."""

    name: str

    def scorer(self) -> tuple[Scorer, PromptEncoder]:
        """What gives likelihoods."""

    def answers(
        self, questions: Sequence[str], manner: GenerationConfig
    ) -> Iterator[tuple[int, Answer | Exception]]:
        """(place of the question, the model's answer or why there is none) as they come."""


class Task(Protocol):
    """One exam, or whatever else is measured."""

    name: str
    unit: str
    bad: InvalidRecords

    def __len__(self) -> int: ...
    def settings(self) -> dict[str, Any]:
        """All that its results depend on, but for the model."""

    def texts(self) -> dict[str, str]:
        """What is asked, by id, to be looked for in training data; none where that is no use."""

    def run(self, model: Model, done: Collection[str]) -> Iterator[Result]:
        """Results of all items but those that are done, as they come."""

    def summary(self, results: Sequence[Result]) -> dict[str, Any]:
        """The figures of results that have no error."""


def accuracy(correct: int, questions: int) -> dict[str, Any]:
    return {
        "correct": correct,
        "questions": questions,
        "accuracy": correct / questions if questions else None,
        "interval": wilson_interval(correct, questions),
    }


def results_of(found: Iterable[tuple[str, Result | Exception]]) -> Iterator[Result]:
    """Of (id, what came of the item or why nothing did).

    Raises the fault of an item when those before it had one too: it is not the items' then.
    """
    faults = 0
    for name, one in found:
        if isinstance(one, Exception):
            faults += 1
            if faults >= MAX_CONSECUTIVE_ERRORS:
                raise one
            yield {"id": name, "error": told(one)}
        else:
            faults = 0
            yield {"id": name, **one}


def scored(
    scorer: Scorer, items: Iterable[T], ask: Callable[[T], tuple[R, Sequence[Row]]]
) -> Iterator[tuple[T, tuple[R, list[float]] | Exception]]:
    """Each item, in their order, with what `ask` makes of it and the scores of its rows."""
    waiting: deque[tuple[T, R | Exception]] = deque()

    def rows() -> Iterator[Sequence[Row]]:
        for item in items:
            try:
                asked, of_it = ask(item)
            except Exception as error:
                waiting.append((item, error))
                yield ()
            else:
                waiting.append((item, asked))
                yield of_it

    for scores in scorer.score(rows()):
        item, asked = waiting.popleft()
        if isinstance(asked, Exception):
            yield item, asked
        elif isinstance(scores, Exception):
            yield item, scores
        else:
            yield item, (asked, scores)


def ask_concurrently(
    ask: Callable[[T], R], items: Sequence[T], at_once: int
) -> Iterator[tuple[int, R | MinimindError]]:
    """(place of the item, what `ask` gives or why it does not) as they come, from threads."""
    with ThreadPoolExecutor(at_once) as pool:
        places = {pool.submit(ask, item): place for place, item in enumerate(items)}
        try:
            for future in as_completed(places):
                try:
                    yield places[future], future.result()
                except MinimindError as error:
                    yield places[future], error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def told(error: Exception) -> str:
    return str(error) if isinstance(error, MinimindError) else f"{type(error).__name__}: {error}"


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` of the items, from all over."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[place * len(items) // limit] for place in range(limit)]
