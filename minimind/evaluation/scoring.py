"""How likely a model holds texts to be: many at once, each as if it stood alone."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from minimind.errors import UsageError
from minimind.inference.engine import Engine
from minimind.inference.requests import Completion, ScoreRequest
from minimind.model import Transformer
from minimind.model.rope import depends_on_length
from minimind.tokenizer import Tokenizer

_SLOTS = 32
_TOKENS = 64 * 512  # of all slots together
_ROOM = 512  # tokens of a slot to begin with, for a context may be far longer than any question
_AHEAD = 64  # items that are in line, so that the engine never waits for words


@dataclass(frozen=True)
class Row:
    """Tokens of which those from `start` on are scored, each given all before it."""

    tokens: tuple[int, ...]
    start: int


class Scorer(Protocol):
    """What gives likelihoods. context: as many tokens of a row as the model reads."""

    context: int

    def score(self, items: Iterable[Sequence[Row]]) -> Iterator[list[float] | Exception]:
        """For each item, in their order, what the model gives its rows, or why there is nothing.

        Of each row, the natural logarithm of what its scored tokens come to, together. Items are
        taken as they are needed, some ahead; one without rows has no scores.
        """


class EngineScorer:
    """By the engine. context: None = the model's own."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, context: int | None = None
    ) -> None:
        longest = model.config.max_position_embeddings
        self.context = min(context or longest, longest)
        self._model, self._tokenizer = model, tokenizer

    def score(self, items: Iterable[Sequence[Row]]) -> Iterator[list[float] | Exception]:
        """See Scorer."""
        asked: deque[list[_Asked] | UsageError] = deque()
        engine = self._engine(_ROOM)
        try:
            for rows in items:
                longest = max((len(row.tokens) - 1 for row in rows), default=0)
                if longest > engine.context:
                    while asked:
                        yield _collect(asked.popleft())
                    engine.close()
                    engine = self._engine(longest)
                try:
                    asked.append(self._ask(engine, rows))
                except UsageError as error:  # a token that the model does not have
                    asked.append(error)
                if len(asked) > _AHEAD:
                    yield _collect(asked.popleft())
            while asked:
                yield _collect(asked.popleft())
        finally:
            engine.close()

    def _engine(self, longest: int) -> Engine:
        room = min(max(_ROOM, 1 << (longest - 1).bit_length()), self.context)
        slots = min(max(_TOKENS // room, 1), _SLOTS)
        return Engine(self._model, self._tokenizer, max_slots=slots, context=room)

    def _ask(self, engine: Engine, rows: Sequence[Row]) -> "list[_Asked]":
        """Rows that begin alike are ends of one text, unless their length counts."""
        together: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for number, row in enumerate(rows):
            assert 0 < row.start < len(row.tokens) <= self.context + 1, "a row that does not fit"
            length = len(row.tokens) - 1
            own = length if depends_on_length(self._model.config, length) else 0
            together.setdefault((row.tokens[: row.start], own), []).append(number)
        return [
            _Asked(numbers, engine.submit(ScoreRequest(prompt, [_end(rows[n]) for n in numbers])))
            for (prompt, _), numbers in together.items()
        ]


@dataclass(frozen=True)
class _Asked:
    """Some rows of an item, by their numbers, on their way."""

    numbers: Sequence[int]
    completion: Completion


def _end(row: Row) -> tuple[int, ...]:
    return row.tokens[row.start :]


def _collect(parts: Sequence[_Asked] | UsageError) -> list[float] | Exception:
    if isinstance(parts, UsageError):
        return parts
    scores: dict[int, float] = {}
    for part in parts:
        try:
            for _ in part.completion:
                pass
        except Exception as error:
            return error
        scores.update(zip(part.numbers, part.completion.scores, strict=True))
    return [scores[number] for number in sorted(scores)]


def windows(tokens: Sequence[int], start: Sequence[int], context: int) -> list[Row]:
    """Rows that score each of the tokens once, none longer than the context allows.

    `start` stands before the first. A long text is read in windows that overlap by half, so that
    each token is given half the context at the least (but for the first ones of the text).
    """
    assert start, "the first token needs something before it"
    all_tokens = (*start, *tokens)
    rows: list[Row] = []
    scored = len(start)
    while scored < len(all_tokens):
        begin = 0 if not rows else scored - max(context // 2, 1)
        end = min(begin + context + 1, len(all_tokens))
        rows.append(Row(all_tokens[begin:end], scored - begin))
        scored = end
    return rows
