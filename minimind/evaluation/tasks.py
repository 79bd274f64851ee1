"""Interfaces of tasks and models, and helpers that all tasks share.

A task holds items (questions, documents), runs them on a model and summarizes the results. The
result of an item is a JSON object with the item's `id`. An item that failed has an `error` instead
of metrics; it is tried again when the evaluation is resumed.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from minimind.data.invalid import InvalidRecords
from minimind.errors import MinimindError, RejectedRequestError, TokenizerError, UsageError
from minimind.evaluation.encoding import PromptEncoder
from minimind.evaluation.scoring import Row, Scorer
from minimind.evaluation.statistics import wilson_interval
from minimind.tokenizer.chat import Message

Result = dict[str, Any]
Outcome = tuple[str, Result | Exception]  # item id, with the item's result or its error
T = TypeVar("T")
R = TypeVar("R")
# Errors of one item, such as a prompt that exceeds the context: repeating it does not help.
ITEM_ERRORS = (UsageError, TokenizerError, RejectedRequestError)
MAX_CONSECUTIVE_ERRORS = 10  # after so many, the cause is the model or the service, not an item


@dataclass(frozen=True)
class GenerationConfig:
    """Decoding settings for answers. Temperature 0 is greedy decoding.

    concurrency: the maximum number of questions answered at the same time.
    """

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    concurrency: int = 64

    top_p = 0.9  # as in `minimind chat`

    def seed_for(self, conversation: Sequence[Message]) -> int:
        """Return the sampling seed of a conversation, independent of its position."""
        question = conversation[-1]["content"]
        return (self.seed + zlib.crc32(question.encode("utf-8", "replace"))) % 2**32


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    tokens: its length in tokens, None if unknown. ended: False if the token limit cut it off, None
    if unknown. seconds: time since the previous answer, or since the start for the first one.
    """

    text: str
    tokens: int | None = None
    ended: bool | None = None
    seconds: float = 0.0


class Model(Protocol):
    """A model under evaluation."""

    name: str

    def scorer(self) -> tuple[Scorer, PromptEncoder]:
        """Return a log-likelihood scorer and the encoder for its prompts.

        Raises UsageError for remote models, which give no log-likelihoods.
        """

    def answers(
        self, conversations: Sequence[Sequence[Message]], generation: GenerationConfig
    ) -> Iterator[tuple[int, Answer | Exception]]:
        """Answer the last message of each conversation.

        Yields (index of the conversation, answer or error) in order of completion.
        """


class Task(Protocol):
    """A benchmark, or another evaluation such as bits per byte.

    name: with the path of its data if that is given, so that it differs from tasks on other data.
    kind: the name without the path. Earlier versions stored results under it.
    """

    name: str
    kind: str
    unit: str
    invalid: InvalidRecords

    def __len__(self) -> int: ...
    def __contains__(self, item_id: object) -> bool:
        """Return True if an item has this id."""

    def settings(self) -> dict[str, Any]:
        """Return everything that the results depend on besides the model."""

    def texts(self) -> dict[str, str]:
        """Return the texts to search training data for, by item id; empty if not applicable."""

    def run(self, model: Model, done: Mapping[str, Result]) -> Iterator[Result]:
        """Yield the results of all items that are not in `done`, in order of completion.

        done: results without errors, by item id.
        """

    def summary(self, results: Sequence[Result]) -> dict[str, Any]:
        """Return the metrics of results without errors."""


def accuracy(correct: int, questions: int) -> dict[str, Any]:
    """Return the accuracy with its counts and its 95 % interval."""
    return {
        "correct": correct,
        "questions": questions,
        "accuracy": correct / questions if questions else None,
        "interval": wilson_interval(correct, questions),
    }


def to_results(outcomes: Iterable[Outcome]) -> Iterator[Result]:
    """Convert outcomes to results. Raises the last of MAX_CONSECUTIVE_ERRORS errors in a row.

    ITEM_ERRORS are not counted, and their results have "permanent": True.
    """
    consecutive_errors = 0
    for name, outcome in outcomes:
        if isinstance(outcome, ITEM_ERRORS):
            yield {"id": name, "error": format_error(outcome), "permanent": True}
        elif isinstance(outcome, Exception):
            consecutive_errors += 1
            if consecutive_errors >= MAX_CONSECUTIVE_ERRORS:
                raise outcome
            yield {"id": name, "error": format_error(outcome)}
        else:
            consecutive_errors = 0
            yield {"id": name, **outcome}


def score_items(
    scorer: Scorer,
    items: Iterable[tuple[str, T]],
    prepare: Callable[[T], tuple[Sequence[Row], Callable[[list[float]], Result]]],
) -> Iterator[Outcome]:
    """Score (id, item) pairs, in order.

    `prepare` returns the rows of an item, and a function from their scores to the item's result.
    """

    def requests() -> Iterator[tuple[tuple[str, Callable[[list[float]], Result] | Exception], Any]]:
        for name, item in items:
            try:
                rows, to_result = prepare(item)
            except Exception as error:
                yield (name, error), ()
            else:
                yield (name, to_result), rows

    for (name, to_result), scores in scorer.score(requests()):
        if isinstance(to_result, Exception):
            yield name, to_result
        elif isinstance(scores, Exception):
            yield name, scores
        else:
            yield name, to_result(scores)


def map_concurrently(
    function: Callable[[T], R], items: Sequence[T], concurrency: int
) -> Iterator[tuple[int, R | MinimindError]]:
    """Call a function on all items in threads.

    Yields (index of the item, return value or MinimindError) in order of completion.
    """
    with ThreadPoolExecutor(concurrency) as pool:
        indices = {pool.submit(function, item): index for index, item in enumerate(items)}
        try:
            for future in as_completed(indices):
                try:
                    yield indices[future], future.result()
                except MinimindError as error:
                    yield indices[future], error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def format_error(error: Exception) -> str:
    """Return an error's message, after its class name if it is not a MinimindError."""
    return str(error) if isinstance(error, MinimindError) else f"{type(error).__name__}: {error}"


def evenly_spaced(items: Sequence[T], limit: int | None) -> list[T]:
    """Return at most `limit` items, evenly spaced over the sequence. None means all."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]
