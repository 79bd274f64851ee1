"""Choosing the next token from logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minimind.errors import UsageError

_GREEDY = 1e-5  # below this temperature logits overflow, and nothing but the best is ever chosen


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 takes the most likely one.

    top_k: 0 = all; top_p: nucleus sampling (Holtzman et al. 2020); repetition_penalty: Keskar et
    al. 2019 (CTRL), section 4.1, over the prompt and what was written. Raises UsageError for
    values out of range.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: object = None

    def __post_init__(self) -> None:
        for name, value, fits, what in (
            ("temperature", self.temperature, 0 <= self.temperature <= 100, "from 0 to 100"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top-k", self.top_k, self.top_k >= 0, "0 (all) or more"),
            (
                "repetition-penalty",
                self.repetition_penalty,
                0.01 <= self.repetition_penalty <= 100,
                "from 0.01 to 100 (1 = none)",
            ),
        ):
            if not fits:
                raise UsageError(f"{name} is {value}; it must be {what}")


def choose(logits: Tensor, seen: Tensor, sampling: Sampling, random: torch.Generator) -> Tensor:
    """The next token of each row: logits [B, vocab] float32, seen [B, T] -> [B]."""
    if sampling.temperature < _GREEDY:
        return _penalise(logits, seen, sampling.repetition_penalty).argmax(-1)
    weights = probabilities(logits, seen, sampling).to(random.device)
    return torch.multinomial(weights, 1, generator=random).squeeze(-1).to(logits.device)


def probabilities(logits: Tensor, seen: Tensor, sampling: Sampling) -> Tensor:
    """What tokens are drawn with, up to a factor a row: [B, vocab] of 0 or more."""
    logits = _penalise(logits, seen, sampling.repetition_penalty) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    weights = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = weights.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        weights = weights.scatter(-1, order, ordered.masked_fill(before >= sampling.top_p, 0))
    return weights


def _penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were seen less likely: divide what is positive, multiply the rest."""
    if penalty == 1:
        return logits
    scores = logits.gather(-1, seen)
    scores = torch.where(scores > 0, scores / penalty, scores * penalty)
    return logits.scatter(-1, seen, scores)
