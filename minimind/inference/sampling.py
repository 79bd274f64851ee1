"""Sampling: from logits to the next token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.errors import UsageError

_GREEDY_TEMPERATURE = 1e-5  # below it scaled logits overflow, and the argmax is always drawn
# On a CPU: a top-k of this size is cheaper than sorting the vocabulary, and nearly always holds
# every token that can be drawn.
_TOP = 64
_MAX_BIAS = 100  # OpenAI's limit; a bias of this size alone decides


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Raises UsageError for values out of range.

    temperature: 0 = greedy.
    top_k: keep the k most likely tokens; 0 = all.
    top_p: nucleus sampling (Holtzman et al. 2020), after top_k.
    min_p: drop tokens below this fraction of the top token's probability (Nguyen et al. 2024),
        after top_p.
    repetition_penalty: for tokens of the prompt and of the completion (Keskar et al. 2019, CTRL,
        section 4.1); 1 = none.
    presence_penalty, frequency_penalty: subtracted from the logits of tokens of the completion,
        once and once per occurrence, as OpenAI defines them.
    logit_bias: added to the logits, by token id.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        invalid = [bias for bias in self.logit_bias.values() if not abs(bias) <= _MAX_BIAS]
        for name, value, least, most, note in (
            ("temperature", self.temperature, 0, 100, ""),
            ("repetition-penalty", self.repetition_penalty, 0.01, 100, " (1 = none)"),
            ("min-p", self.min_p, 0, 1, ""),
            ("presence-penalty", self.presence_penalty, -2, 2, ""),
            ("frequency-penalty", self.frequency_penalty, -2, 2, ""),
            ("logit-bias", next(iter(invalid), 0), -_MAX_BIAS, _MAX_BIAS, ""),
        ):
            if not least <= value <= most:
                raise UsageError(f"{name} is {value}; it must be from {least} to {most}{note}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise UsageError(f"top-k is {self.top_k}; it must be 0 (all) or more")

    @property
    def greedy(self) -> bool:
        """True when the most likely token is always taken."""
        return self.temperature < _GREEDY_TEMPERATURE

    @property
    def truncates(self) -> bool:
        """True when top-k, top-p or min-p is active."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def changes_logits(self) -> bool:
        """True when a penalty or a bias is active."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or bool(self.logit_bias)
        )


class Penalties:
    """Penalties and biases of one sequence, with the counts of its tokens."""

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], vocab_size: int, device: torch.device
    ) -> None:
        self._sampling = sampling
        self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._seen[torch.tensor(prompt, device=device)] = True
        self._counts = torch.zeros(vocab_size, device=device)
        self._bias = torch.zeros(vocab_size, device=device)
        for token, bias in sampling.logit_bias.items():
            self._bias[token] = bias

    def add(self, token: int) -> None:
        """Count a sampled token."""
        self._seen[token] = True
        self._counts[token] += 1

    def apply(self, logits: Tensor) -> Tensor:
        """Return adjusted logits, [vocab] -> [vocab].

        The repetition penalty divides positive logits and multiplies the others.
        """
        s = self._sampling
        # --8<-- [start:repetition-penalty]
        if s.repetition_penalty != 1:
            penalty = s.repetition_penalty
            changed = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._seen, changed, logits)
        # --8<-- [end:repetition-penalty]
        if s.presence_penalty or s.frequency_penalty:
            counts = self._counts
            logits = logits - (s.frequency_penalty * counts + s.presence_penalty * (counts > 0))
        return logits + self._bias


def sample(logits: Tensor, samplings: Sequence[Sampling], uniform: Sequence[float]) -> Tensor:
    """Return the next token of each row: logits [B, vocab] float32 -> [B] int64.

    uniform: a random number from [0, 1) per row. A row's token depends on its own logits, sampling
    parameters and number alone.
    """
    random_rows = [row for row, sampling in enumerate(samplings) if not sampling.greedy]
    if not random_rows:
        return logits.argmax(-1)
    tokens = (
        logits.argmax(-1)
        if len(random_rows) < len(samplings)
        else logits.new_empty(len(samplings), dtype=torch.int64)
    )
    for truncates in (False, True):
        rows = [row for row in random_rows if samplings[row].truncates == truncates]
        if rows:
            tokens[rows] = _sample_rows(
                logits[rows], [samplings[row] for row in rows], [uniform[row] for row in rows]
            )
    return tokens


def _sample_rows(logits: Tensor, samplings: Sequence[Sampling], uniform: Sequence[float]) -> Tensor:
    """Invert the cumulative distribution of each row at its random number."""
    # --8<-- [start:draw]
    ids, weights = candidates(logits, samplings)
    cumulative = weights.cumsum(-1)
    number = torch.tensor(uniform, device=logits.device)[:, None]
    index = torch.searchsorted(cumulative, number * cumulative[:, -1:], right=True)
    # --8<-- [end:draw]
    ranks = torch.arange(1, weights.shape[-1] + 1, device=logits.device)
    last = ((weights > 0) * ranks).amax(-1, keepdim=True).sub_(1)
    # Rounding may lead past the last candidate. Rows of NaN have none, hence the clamp.
    return ids.gather(-1, torch.minimum(index, last).clamp_(min=0))[:, 0]


def candidates(logits: Tensor, samplings: Sequence[Sampling]) -> tuple[Tensor, Tensor]:
    """Return (token ids, unnormalized probabilities), both [B, n], after truncation.

    Either all rows truncate or none does. Tokens that are cut have probability 0.
    """
    device, vocab = logits.device, logits.shape[-1]
    scaled = logits / torch.tensor([s.temperature for s in samplings], device=device)[:, None]
    if not samplings[0].truncates:
        return torch.arange(vocab, device=device).expand_as(scaled), scaled.softmax(-1)
    limits = torch.tensor(
        [(min(s.top_k or vocab, vocab), s.top_p, s.min_p) for s in samplings], device=device
    )
    if device.type != "cpu" or vocab <= _TOP:
        return _truncate(scaled, limits, vocab)
    ids, weights = _truncate(scaled, limits, _TOP)
    top_k = limits[:, 0]
    needs_more = (top_k > _TOP) & ((weights[:, -1] > 0) | (top_k < vocab))
    if needs_more.any():  # sort all tokens of these rows
        rows = needs_more.nonzero()[:, 0]
        padding = (0, vocab - _TOP)
        ids, weights = F.pad(ids, padding), F.pad(weights, padding)
        ids[rows], weights[rows] = _truncate(scaled[rows], limits[rows], vocab)
    return ids, weights


def _truncate(scaled: Tensor, limits: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return (ids, weights) [B, number] of the most likely tokens, in descending order.

    scaled: logits over temperature, [B, vocab]; limits: [B, 3], top_k, top_p and min_p. The nucleus
    is a fraction of what top_k leaves, so weights are invalid where number < top_k < vocab.
    """
    vocab = scaled.shape[-1]
    top_k, top_p, min_p = limits[:, :, None].unbind(1)  # [B, 1] each
    top = scaled.topk(number).indices.sort(-1).values if number < vocab else None
    values, ids = (scaled if top is None else scaled.gather(-1, top)).sort(
        stable=True, dim=-1, descending=True
    )  # stable: of equal logits the lowest id comes first, as in argmax
    ids = ids if top is None else top.gather(-1, ids)
    # --8<-- [start:truncate]
    best = values[:, :1]
    rank = torch.arange(number, device=scaled.device)
    weights = (values - best).exp().masked_fill(rank >= top_k, 0)
    sum_of_all = (scaled - best).exp().sum(-1, keepdim=True)
    total = torch.where(top_k < vocab, weights.sum(-1, keepdim=True), sum_of_all)
    before = weights.cumsum(-1) - weights
    cut = ((before >= top_p * total) & (top_p < 1)) | (weights < min_p)
    return ids, weights.masked_fill(cut, 0)
    # --8<-- [end:truncate]
