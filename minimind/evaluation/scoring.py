"""Log-likelihoods of given tokens under a model.

Sequences are scored in batches. Each score is bit-identical to the score of the sequence alone.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from minimind.errors import UsageError
from minimind.inference.engine import Engine
from minimind.inference.requests import Completion, ScoreRequest
from minimind.model import Transformer
from minimind.model.rope import depends_on_length
from minimind.tokenizer import Tokenizer

K = TypeVar("K")

_MAX_SLOTS = 32
_CACHE_TOKENS = 64 * 512  # KV cache size of all slots together
_MIN_SLOT_TOKENS = 512  # initial slot size; most questions are far shorter than the context
_LOOKAHEAD = 64  # items submitted before the first one is awaited, so that the engine never idles


@dataclass(frozen=True)
class Row:
    """A token sequence whose tokens from index `start` on are scored, given all before them."""

    tokens: tuple[int, ...]
    start: int


class Scorer(Protocol):
    """A source of log-likelihoods. context: the maximum number of tokens the model attends to."""

    context: int

    def score(
        self, items: Iterable[tuple[K, Sequence[Row]]]
    ) -> Iterator[tuple[K, list[float] | Exception]]:
        """Score (key, rows) pairs and yield (key, scores or error) in the same order.

        The score of a row is the sum of the natural log-probabilities of its scored tokens. Items
        are consumed lazily, some ahead of their scores. An item without rows has an empty list.
        """


class EngineScorer:
    """Scorer on the inference engine. context: None means the model's own."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, context: int | None = None
    ) -> None:
        max_context = model.config.max_position_embeddings
        self.context = min(context or max_context, max_context)
        self._model, self._tokenizer = model, tokenizer

    def score(
        self, items: Iterable[tuple[K, Sequence[Row]]]
    ) -> Iterator[tuple[K, list[float] | Exception]]:
        """Score (key, rows) pairs; see Scorer."""
        pending: deque[tuple[K, list[_Pending] | UsageError]] = deque()

        def finish_first() -> tuple[K, list[float] | Exception]:
            key, parts = pending.popleft()
            return key, parts if isinstance(parts, UsageError) else _wait_for_scores(parts)

        engine = self._create_engine(_MIN_SLOT_TOKENS)
        try:
            for key, rows in items:
                longest = max((len(row.tokens) - 1 for row in rows), default=0)
                if longest > engine.context:
                    while pending:
                        yield finish_first()
                    engine.close()
                    engine = self._create_engine(longest)
                try:
                    pending.append((key, self._submit(engine, rows)))
                except UsageError as error:  # such as a token id outside the vocabulary
                    pending.append((key, error))
                if len(pending) > _LOOKAHEAD:
                    yield finish_first()
            while pending:
                yield finish_first()
        finally:
            engine.close()

    def _create_engine(self, num_tokens: int) -> Engine:
        """Create an engine whose slots hold `num_tokens`, rounded up to a power of two."""
        size = min(max(_MIN_SLOT_TOKENS, 1 << (num_tokens - 1).bit_length()), self.context)
        slots = min(max(_CACHE_TOKENS // size, 1), _MAX_SLOTS)
        return Engine(self._model, self._tokenizer, max_slots=slots, context=size)

    def _submit(self, engine: Engine, rows: Sequence[Row]) -> "list[_Pending]":
        """Submit rows with the same prompt as continuations of one request.

        With RoPE scaling that depends on the length, only rows of the same length share a request.
        """
        groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for index, row in enumerate(rows):
            assert 0 < row.start < len(row.tokens) <= self.context + 1, "row exceeds the context"
            length = len(row.tokens) - 1
            scaled_length = length if depends_on_length(self._model.config, length) else 0
            groups.setdefault((row.tokens[: row.start], scaled_length), []).append(index)
        return [
            _Pending(
                indices,
                engine.submit(
                    ScoreRequest(prompt, [rows[i].tokens[rows[i].start :] for i in indices])
                ),
            )
            for (prompt, _), indices in groups.items()
        ]


@dataclass(frozen=True)
class _Pending:
    """A submitted request, with the indices of its rows in their item."""

    indices: Sequence[int]
    completion: Completion


def _wait_for_scores(parts: Sequence[_Pending]) -> list[float] | Exception:
    """Wait for the requests of an item and return the scores of its rows."""
    scores: dict[int, float] = {}
    for part in parts:
        try:
            for _ in part.completion:
                pass
        except Exception as error:
            return error
        scores.update(zip(part.indices, part.completion.scores, strict=True))
    return [scores[index] for index in sorted(scores)]


def sliding_windows(tokens: Sequence[int], start: Sequence[int], context: int) -> list[Row]:
    """Split a text into rows that fit the context and score each of its tokens once.

    `start` holds the tokens before the text, at least one. Consecutive rows overlap by half a
    context, so that every token except those of the first row has at least half a context before
    it.
    """
    assert start, "the first token needs a token before it"
    # --8<-- [start:windows]
    all_tokens = (*start, *tokens)
    rows: list[Row] = []
    scored = len(start)
    while scored < len(all_tokens):
        begin = 0 if not rows else scored - max(context // 2, 1)
        end = min(begin + context + 1, len(all_tokens))
        rows.append(Row(all_tokens[begin:end], scored - begin))
        scored = end
    return rows
    # --8<-- [end:windows]
