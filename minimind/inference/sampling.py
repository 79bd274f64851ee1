"""Choosing the next token from logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minimind.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 takes the most likely one.

    top_k: 0 = all; top_p: nucleus sampling (Holtzman et al. 2020); repetition_penalty: Keskar et
    al. 2019 (CTRL), section 4.1, over the prompt and what was written.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, value, fits, what in (
            ("temperature", self.temperature, self.temperature >= 0, "0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all) or more"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0"),
        ):
            if not fits:
                raise UsageError(f"{name} is {value}; it must be {what}")


def choose(logits: Tensor, seen: Tensor, sampling: Sampling, random: torch.Generator) -> Tensor:
    """The next token of each row: logits [B, vocab] float32, seen [B, T] -> [B]."""
    if sampling.repetition_penalty != 1.0:
        logits = _penalise(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        ordered = ordered.masked_fill(before >= sampling.top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter_(-1, order, ordered)
    chosen = torch.multinomial(logits.softmax(-1).to(random.device), 1, generator=random)
    return chosen.squeeze(-1).to(logits.device)


def _penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were seen less likely: divide what is positive, multiply the rest."""
    scores = logits.gather(-1, seen)
    scores = torch.where(scores > 0, scores / penalty, scores * penalty)
    return logits.scatter(-1, seen, scores)
