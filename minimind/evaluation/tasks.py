"""What models are asked: each task reads its items, has a model deal with them, and adds up.

A result is a JSON object with the item's `id`; one that has an `error` gave none, and is tried
again when an evaluation goes on.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from minimind.data.read import BadLines
from minimind.errors import MinimindError
from minimind.evaluation.scoring import Scorer
from minimind.evaluation.statistics import wilson_interval
from minimind.evaluation.words import Words

Result = dict[str, Any]
T = TypeVar("T")
MOST_FAULTS = 10  # one after the other; then it is not the questions


class Model(Protocol):
    """Something to examine. A service has no scorer; asking for it raises UsageError."""

    name: str

    def scorer(self) -> tuple[Scorer, Words]:
        """What gives likelihoods."""

    def answers(
        self, questions: Sequence[str], max_new_tokens: int
    ) -> Iterator[tuple[int, str | Exception]]:
        """(place of the question, the model's answer or why there is none) as they come."""


class Task(Protocol):
    """One exam, or whatever else is measured."""

    name: str
    unit: str
    main: str  # the figure of its summary that counts
    bad: BadLines

    def __len__(self) -> int: ...
    def settings(self) -> dict[str, Any]:
        """All that its results depend on, but for the model."""

    def texts(self) -> dict[str, str]:
        """What is asked, by id, to be looked for in training data; none where that is no use."""

    def run(self, model: Model, done: Collection[str]) -> Iterator[Result]:
        """Results of all items but those that are done, as they come."""

    def summary(self, results: Sequence[Result]) -> dict[str, Any]:
        """The figures of results that have no error."""


def share_right(correct: int, questions: int) -> dict[str, Any]:
    return {
        "correct": correct,
        "questions": questions,
        "accuracy": correct / questions if questions else None,
        "interval": wilson_interval(correct, questions),
    }


def apart(
    items: Iterable[T],
    at_once: int,
    deal_with: Callable[[Sequence[T]], list[Result]],
    name_of: Callable[[T], str],
) -> Iterator[Result]:
    """Results of many items at once; where that goes wrong, of each one alone.

    Raises the fault of an item when those before it had one too: it is not the items' then.
    """
    faults = 0
    remaining = iter(items)
    while some := list(itertools.islice(remaining, at_once)):
        try:
            results = deal_with(some)
        except Exception:
            pass
        else:
            faults = 0
            yield from results
            continue
        for item in some:
            try:
                yield from deal_with([item])
                faults = 0
            except Exception as error:
                faults += 1
                if faults >= MOST_FAULTS:
                    raise
                yield {"id": name_of(item), "error": told(error)}


def told(error: Exception) -> str:
    return str(error) if isinstance(error, MinimindError) else f"{type(error).__name__}: {error}"


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` of the items, from all over."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[place * len(items) // limit] for place in range(limit)]
