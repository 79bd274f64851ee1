"""Choosing the next token from logits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.errors import UsageError

_GREEDY = 1e-5  # below this temperature logits overflow, and nothing but the best is ever chosen
_LIKELIEST = 64  # words among which the choice mostly falls: finding them is cheaper than sorting
_MOST_BIAS = 100  # OpenAI's limit: more than this decides a choice alone


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 takes the most likely one.

    top_k: 0 = all; top_p: nucleus sampling (Holtzman et al. 2020); min_p: at least this share of
    the likeliest token's probability (Nguyen et al. 2024); they cut in this order.
    repetition_penalty: Keskar et al. 2019 (CTRL), section 4.1, over the prompt and what was
    written. presence_penalty is taken off the logits of tokens that were written, frequency_penalty
    as often as they were, and logit_bias is added, as OpenAI defines them. Raises UsageError for
    values out of range.
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
        wrong_bias = [bias for bias in self.logit_bias.values() if not abs(bias) <= _MOST_BIAS]
        for name, value, least, most, note in (
            ("temperature", self.temperature, 0, 100, ""),
            ("repetition-penalty", self.repetition_penalty, 0.01, 100, " (1 = none)"),
            ("min-p", self.min_p, 0, 1, ""),
            ("presence-penalty", self.presence_penalty, -2, 2, ""),
            ("frequency-penalty", self.frequency_penalty, -2, 2, ""),
            ("logit-bias", next(iter(wrong_bias), 0), -_MOST_BIAS, _MOST_BIAS, ""),
        ):
            if not least <= value <= most:
                raise UsageError(f"{name} is {value}; it must be from {least} to {most}{note}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise UsageError(f"top-k is {self.top_k}; it must be 0 (all) or more")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, whatever the random number."""
        return self.temperature < _GREEDY

    @property
    def truncates(self) -> bool:
        """Whether unlikely tokens are left out."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def changes_logits(self) -> bool:
        """Whether what was said, or a bias, counts."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or bool(self.logit_bias)
        )


class Penalties:
    """What one text's own words and biases do to its logits."""

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], vocab_size: int, device: torch.device
    ) -> None:
        self._sampling = sampling
        self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._seen[torch.tensor(prompt, device=device)] = True
        self._written = torch.zeros(vocab_size, device=device)
        self._bias = torch.zeros(vocab_size, device=device)
        for token, bias in sampling.logit_bias.items():
            self._bias[token] = bias

    def wrote(self, token: int) -> None:
        """Count a token that was chosen."""
        self._seen[token] = True
        self._written[token] += 1

    def apply(self, logits: Tensor) -> Tensor:
        """[vocab] -> [vocab]. Repetition: divide what is positive, multiply the rest."""
        s = self._sampling
        if s.repetition_penalty != 1:
            penalty = s.repetition_penalty
            changed = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._seen, changed, logits)
        if s.presence_penalty or s.frequency_penalty:
            written = self._written
            logits = logits - (s.frequency_penalty * written + s.presence_penalty * (written > 0))
        return logits + self._bias


def choose(logits: Tensor, samplings: Sequence[Sampling], uniform: Sequence[float]) -> Tensor:
    """The next token of each row: logits [B, vocab] float32, a number from [0, 1) each -> [B].

    A row's token depends on its own logits, sampling and number alone.
    """
    drawn = [row for row, sampling in enumerate(samplings) if not sampling.greedy]
    if not drawn:
        return logits.argmax(-1)
    chosen = (
        logits.argmax(-1)
        if len(drawn) < len(samplings)
        else logits.new_empty(len(samplings), dtype=torch.int64)
    )
    for truncates in (False, True):
        rows = [row for row in drawn if samplings[row].truncates == truncates]
        if rows:
            chosen[rows] = _draw(
                logits[rows], [samplings[row] for row in rows], [uniform[row] for row in rows]
            )
    return chosen


def _draw(logits: Tensor, samplings: Sequence[Sampling], uniform: Sequence[float]) -> Tensor:
    """The token at which the sum of probabilities passes the row's number."""
    ids, weights = candidates(logits, samplings)
    sums = weights.cumsum(-1)
    number = torch.tensor(uniform, device=logits.device)[:, None]
    place = torch.searchsorted(sums, number * sums[:, -1:], right=True)
    ranks = torch.arange(1, weights.shape[-1] + 1, device=logits.device)
    last = ((weights > 0) * ranks).amax(-1, keepdim=True).sub_(1)
    # Rounding may lead beyond the last; scores that are not numbers have none.
    return ids.gather(-1, torch.minimum(place, last).clamp_(min=0))[:, 0]


def candidates(logits: Tensor, samplings: Sequence[Sampling]) -> tuple[Tensor, Tensor]:
    """(token ids, weights), both [B, n]: what tokens are drawn with, up to a factor a row.

    The rows all cut unlikely tokens off, or none does. What is cut off weighs 0.
    """
    device, vocab = logits.device, logits.shape[-1]
    scaled = logits / torch.tensor([s.temperature for s in samplings], device=device)[:, None]
    if not samplings[0].truncates:
        return torch.arange(vocab, device=device).expand_as(scaled), scaled.softmax(-1)
    limits = torch.tensor(
        [(min(s.top_k or vocab, vocab), s.top_p, s.min_p) for s in samplings], device=device
    )
    if device.type != "cpu" or vocab <= _LIKELIEST:
        return _cut(scaled, limits, vocab)
    ids, weights = _cut(scaled, limits, _LIKELIEST)
    top_k = limits[:, 0]
    is_open = (top_k > _LIKELIEST) & ((weights[:, -1] > 0) | (top_k < vocab))
    if is_open.any():  # these need all tokens in order
        rows = is_open.nonzero()[:, 0]
        more = (0, vocab - _LIKELIEST)
        ids, weights = F.pad(ids, more), F.pad(weights, more)
        ids[rows], weights[rows] = _cut(scaled[rows], limits[rows], vocab)
    return ids, weights


def _cut(scaled: Tensor, limits: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """(ids, weights) [B, number] of the likeliest tokens, in falling order.

    scaled: [B, vocab]; limits: [B, 3], top_k, top_p and min_p. The nucleus is a share of what top_k
    leaves: with a top_k between `number` and all, weights mean nothing.
    """
    vocab = scaled.shape[-1]
    top_k, top_p, min_p = limits[:, :, None].unbind(1)
    some = scaled.topk(number).indices.sort(-1).values if number < vocab else None
    values, ids = (scaled if some is None else scaled.gather(-1, some)).sort(
        stable=True, dim=-1, descending=True
    )  # of equal ones the first word comes first, as in a greedy choice
    ids = ids if some is None else some.gather(-1, ids)
    best = values[:, :1]
    rank = torch.arange(number, device=scaled.device)
    weights = (values - best).exp().masked_fill(rank >= top_k, 0)
    everything = (scaled - best).exp().sum(-1, keepdim=True)
    total = torch.where(top_k < vocab, weights.sum(-1, keepdim=True), everything)
    before = weights.cumsum(-1) - weights
    cut = ((before >= top_p * total) & (top_p < 1)) | (weights < min_p)
    return ids, weights.masked_fill(cut, 0)
