"""What keeps the experts of a mixture evenly busy: a loss beside the objective's own.

Balanced within each sequence (DeepSeek-AI 2024, DeepSeek-V3, section 2.1.2; the form goes back to
Fedus et al. 2021, Switch Transformers, section 2.2): in a layer, with f_e the share of a window's
choices that fell on expert e and p_e its mean probability, it is E times the sum of f_e * p_e,
which is 1 when both are even and E / K when K of E experts get everything. Each window counts as
much as the tokens it learns, so that the whole is a mean over all of them however they are split.

E experts of which each token chooses K, L layers, B windows of T tokens.
"""

from typing import Any

import torch
from torch import Tensor

from minimind.model.experts import Routing


def real_tokens(learned: Tensor, segments: Tensor | None) -> Tensor:
    """[B, T], False for the padding of packed windows.

    learned: [B, T]. Padding is the last segment of its window, and the only one without anything
    to learn; without segments there is none.
    """
    if segments is None:
        return torch.ones_like(learned)
    last = torch.where(learned, segments, -1).amax(dim=1, keepdim=True)
    return segments <= last


def balance_sums(
    routing: Routing, learned: Tensor, segments: Tensor | None, weight: Tensor | None = None
) -> dict[str, Tensor]:
    """Further sums of an objective, whose figures are `balance_figures`.

    weight: [B], how much each window counts; None = as many as it has learned tokens.
    balance: [2], the loss of each window times its weight, and the weights; only this one has a
    gradient. expert_tokens: [L, E] choices; router_entropy: [2], nats over all layers and
    tokens, and their number; routed_tokens: what the choices must add up to.
    """
    real = real_tokens(learned, segments)
    weight = (learned.sum(1) if weight is None else weight).float()
    logits, chosen = torch.stack(routing.logits), torch.stack(routing.chosen)  # [L, B, T, …]
    num_experts, num_chosen = logits.shape[-1], chosen.shape[-1]
    logs = logits.log_softmax(-1)
    probabilities = logs.exp() * real.unsqueeze(-1)
    choices = torch.zeros_like(logits).scatter_(-1, chosen, 1.0) * real.unsqueeze(-1)
    counts = choices.sum(2)  # [L, B, E]
    size = real.sum(1).clamp(min=1)[:, None]
    shares, means = counts / (num_chosen * size), probabilities.sum(2) / size
    loss = num_experts * (shares * means).sum(-1).mean(0)
    entropy = -(probabilities.detach() * logs.detach()).sum()
    num_routed = real.sum() * len(logits)
    return {
        "balance": torch.stack(((loss * weight).sum(), weight.sum())),
        "expert_tokens": counts.sum(1).long(),
        "router_entropy": torch.stack((entropy, num_routed.float())),
        "routed_tokens": num_routed * num_chosen,
    }


def balance_figures(sums: dict[str, Any]) -> dict[str, float]:
    """Figures of what `balance_sums` gave.

    expert_load/e: share of all choices, over the layers; even is 1 / E. Experts of different
    layers have nothing in common, so expert_load/most and /least are those of any layer.
    router_entropy: nats a token; ln E when the router does not care. dropped_tokens: choices that
    no expert computed, which sorting tokens by expert leaves no room for.
    """
    layers: list[list[int]] = sums["expert_tokens"]
    totals = [max(sum(layer), 1) for layer in layers]
    shares = [
        [count / total for count in layer] for layer, total in zip(layers, totals, strict=True)
    ]
    every = [share for layer in shares for share in layer]
    loss, learned = sums["balance"]
    entropy, tokens = sums["router_entropy"]
    return (
        {"balance": loss / max(learned, 1.0)}
        | {f"expert_load/{e}": sum(of) / len(of) for e, of in enumerate(zip(*shares, strict=True))}
        | {"expert_load/most": max(every), "expert_load/least": min(every)}
        | {"router_entropy": entropy / max(tokens, 1.0)}
        | {"dropped_tokens": sums["routed_tokens"] - sum(map(sum, layers))}
    )


def with_balance(
    total: Tensor,
    coefficient: float,
    routing: Routing,
    learned: Tensor,
    segments: Tensor | None,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """An objective's sum of losses with that of balance in it, and what `balance_sums` gave."""
    sums = balance_sums(routing, learned, segments, weight)
    total = total + coefficient * sums["balance"][0]
    return total, {name: value.detach() for name, value in sums.items()}


def without_balance(
    loss: float, coefficient: float, sums: dict[str, Any]
) -> tuple[float, dict[str, float]]:
    """The objective's mean loss alone, and `balance_figures`; for a dense model there are none."""
    if "balance" not in sums:
        return loss, {}
    metrics = balance_figures(sums)
    return loss - coefficient * metrics["balance"], metrics
