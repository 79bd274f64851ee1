"""Token ids that a model and its tokenizer share: checks, masks, log-probabilities.

A model may have more embedding rows than its tokenizer has tokens (Qwen3-0.6B: 151,936 rows and
151,669 tokens), and a tokenizer may leave ids unused.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from minimind.errors import UsageError
from minimind.inference.requests import TokenLogprob
from minimind.tokenizer import Tokenizer


class ModelVocabulary:
    """The vocabulary of a tokenizer within the embedding rows of a model."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, device: torch.device) -> None:
        self.num_ids = min(tokenizer.vocab_size, vocab_size)
        self._num_tokens = len(tokenizer.token_ids)
        unused = torch.ones(vocab_size, dtype=torch.bool)
        unused[[token for token in tokenizer.token_ids if token < self.num_ids]] = False
        self._unused = unused.to(device) if unused.any() else None  # [vocab]

    def check(self, name: str, ids: Iterable[int]) -> None:
        """Raise UsageError when an id is outside the vocabulary."""
        if not all(0 <= token < self.num_ids for token in ids):
            raise UsageError(f"{name}: token ids go from 0 to {self.num_ids - 1:,} in this model")

    def mask(self, scores: Tensor) -> Tensor:
        """Return `scores` [..., vocab] with -inf for ids that have no token.

        Everything that samples or lists tokens goes through here.
        """
        if self._unused is None:
            return scores
        return scores.masked_fill(self._unused, -torch.inf)

    def token_logprobs(
        self, logprobs: Tensor, tokens: Tensor, top_counts: Sequence[int]
    ) -> Iterator[TokenLogprob]:
        """Yield, per row, the log-probability of its token and of its most likely tokens.

        logprobs: [rows, vocab]; tokens: [rows]; top_counts: alternatives to list, per row.
        """
        chosen = logprobs.gather(-1, tokens[:, None])[:, 0].tolist()
        most = min(max(top_counts, default=0), self._num_tokens, logprobs.shape[-1])
        top = self.mask(logprobs).topk(most)
        values, ids = top.values.tolist(), top.indices.tolist()
        for row, token in enumerate(tokens.tolist()):
            alternatives = zip(ids[row], values[row], strict=True)
            yield TokenLogprob(token, chosen[row], tuple(alternatives)[: top_counts[row]])

    def sampled_logprobs(
        self, logits: Tensor, tokens: Tensor, top_counts: Sequence[int | None]
    ) -> dict[int, TokenLogprob]:
        """Return the log-probability of the sampled token for each row with a top count.

        logits: [rows, vocab]; tokens: [rows].
        """
        counts = {row: count for row, count in enumerate(top_counts) if count is not None}
        if not counts:
            return {}
        rows = list(counts)
        logprobs = logits[rows].log_softmax(-1)
        entries = self.token_logprobs(logprobs, tokens[rows], list(counts.values()))
        return dict(zip(rows, entries, strict=True))
