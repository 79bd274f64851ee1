"""How likely a model holds texts to be: many at once, each as if it stood alone.

Rows are sorted by length and padded on the right, where a causal model does not look. What all rows
of a call begin with, such as the examples before each question of a subject, is read once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from minimind.errors import ModelError
from minimind.model import Transformer
from minimind.model.cache import KVCache
from minimind.model.rope import depends_on_length

_TOKENS = 2048  # read at once
_HELD = 16 * _TOKENS  # keys and values of so many at once
_LOGITS = 1 << 24  # numbers at once
_WORTH_SHARING = 64  # tokens


@dataclass(frozen=True)
class Row:
    """Tokens of which those from `start` on are scored, each given all before it."""

    tokens: tuple[int, ...]
    start: int


class Scorer:
    """Scores rows with one model. context: None = the model's own."""

    def __init__(self, model: Transformer, context: int | None = None) -> None:
        longest = model.config.max_position_embeddings
        self.model, self.context = model, min(context or longest, longest)
        self._device = model.head_weight.device
        self._vocab_size = model.config.vocab_size

    def score(self, rows: Sequence[Row]) -> list[float]:
        """The natural logarithm of what the scored tokens of each row come to, together.

        Raises ModelError when the model gives what is no number.
        """
        for row in rows:
            assert 0 < row.start < len(row.tokens) <= self.context + 1, "a row that does not fit"
        # Rows that differ in what is written last, as letters do, are read once.
        reads = sorted({row.tokens[:-1] for row in rows}, key=lambda read: (-len(read), read))
        wanted: dict[tuple[int, ...], list[int]] = {}
        for number, row in enumerate(rows):
            wanted.setdefault(row.tokens[:-1], []).append(number)
        scores = [0.0] * len(rows)
        with torch.inference_mode():
            cache, prefix = self._shared(rows)
            for batch in self._batches(reads, prefix):
                hidden = self._hidden(batch, prefix, cache)
                asked = [(at, number) for at, read in enumerate(batch) for number in wanted[read]]
                sums = self._sums(hidden, [(at, rows[number]) for at, number in asked], prefix)
                for (_, number), value in zip(asked, sums, strict=True):
                    scores[number] = value
        if not all(value == value and abs(value) != float("inf") for value in scores):
            raise ModelError(
                "the model gives scores that are not numbers: its weights are damaged, or its "
                "training went wrong. Take another checkpoint, or copy the model again"
            )
        return scores

    def _shared(self, rows: Sequence[Row]) -> tuple[KVCache | None, int]:
        """What all rows begin with, read once: its keys and values, and its length."""
        if len(rows) < 2 or self._depends_on_length(max(len(row.tokens) for row in rows)):
            return None, 0
        first, last = min(row.tokens for row in rows), max(row.tokens for row in rows)
        pairs = zip(first, last, strict=False)
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        length = min(alike, min(row.start for row in rows) - 1)
        if length < _WORTH_SHARING:
            return None, 0
        cache = self._cache(1, length)
        self.model(self._tensor([first[:length]]), cache=cache)
        return cache, length

    def _depends_on_length(self, length: int) -> bool:
        return depends_on_length(self.model.config, length)

    def _cache(self, batch: int, length: int) -> KVCache:
        weight = self.model.head_weight
        return KVCache(self.model.config, batch, length, device=weight.device, dtype=weight.dtype)

    def _batches(
        self, reads: Sequence[tuple[int, ...]], prefix: int
    ) -> list[list[tuple[int, ...]]]:
        """Neighbours in length, as many as make up `_TOKENS` with their padding."""
        batches: list[list[tuple[int, ...]]] = []
        for read in reads:
            if batches and self._fits(len(batches[-1]) + 1, batches[-1][0], read, prefix):
                batches[-1].append(read)
            else:
                batches.append([read])
        return batches

    def _fits(
        self, rows: int, longest: tuple[int, ...], read: tuple[int, ...], prefix: int
    ) -> bool:
        """Whether `read` may be the last of so many rows in a batch that begins with `longest`."""
        width = len(longest)
        if self._depends_on_length(width):  # padding would change its frequencies
            return len(read) == width and rows * width <= _TOKENS
        return rows * (width - prefix) <= _TOKENS and rows * width <= _HELD

    def _hidden(
        self, batch: Sequence[tuple[int, ...]], prefix: int, cache: KVCache | None
    ) -> Tensor:
        """[rows, tokens after the prefix, hidden]."""
        width = len(batch[0])
        tokens = self._tensor([[*read, *[0] * (width - len(read))][prefix:] for read in batch])
        if cache is None:
            return self.model(tokens)
        own = self._cache(len(batch), width)
        own.keys[:, :, :, :prefix] = cache.keys
        own.values[:, :, :, :prefix] = cache.values
        own.length = prefix
        return self.model(tokens, cache=own)

    def _sums(self, hidden: Tensor, rows: Sequence[tuple[int, Row]], prefix: int) -> list[float]:
        """For each (place in the batch, row) the sum over its scored tokens."""
        places = [
            (at, position - 1 - prefix, row.tokens[position], number)
            for number, (at, row) in enumerate(rows)
            for position in range(row.start, len(row.tokens))
        ]
        step = max(_LOGITS // self._vocab_size, 1)
        sums = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
        for first in range(0, len(places), step):
            at, position, token, number = self._tensor(places[first : first + step]).unbind(1)
            scores = self._logits(hidden[at, position]).float().log_softmax(-1)
            own = scores.gather(1, token[:, None])[:, 0]
            sums.index_add_(0, number.cpu(), own.cpu().double())
        return sums.tolist()

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)

    def _tensor(self, numbers: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(numbers, device=self._device)


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
