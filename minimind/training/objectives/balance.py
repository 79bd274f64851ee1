"""Load balancing of a mixture of experts: an auxiliary loss that keeps all experts in use.

Sequence-wise balance loss (DeepSeek-AI 2024, DeepSeek-V3, section 2.1.2; the form goes back to
Fedus et al. 2021, Switch Transformers, section 2.2). In each layer, for one sequence,

    loss = E * sum over e of f_e * p_e

where f_e is the fraction of the sequence's choices that fell on expert e, and p_e is the mean
router probability of expert e. The loss is 1 when both are uniform, and E / K when K of the E
experts receive every token. Each sequence is weighted by its number of label tokens, so that the
mean over a batch is the same however the batch is split.

Shapes: L layers; B sequences of T tokens; E experts, of which each token chooses K.
"""

from typing import Any

import torch
from torch import Tensor

from minimind.model.experts import Routing


def padding_mask(label_mask: Tensor, segments: Tensor | None) -> Tensor:
    """Return a mask [B, T] that is False for the padding of packed sequences.

    label_mask: [B, T], True for label tokens; segments: [B, T]. The padding of a packed sequence
    is its last segment, and the only segment without labels. Without segments there is no padding.
    """
    if segments is None:
        return torch.ones_like(label_mask)
    last = torch.where(label_mask, segments, -1).amax(dim=1, keepdim=True)  # [B, 1]
    return segments <= last


def balance_sums(
    routing: Routing, label_mask: Tensor, segments: Tensor | None, weight: Tensor | None = None
) -> dict[str, Tensor]:
    """Compute the balance loss and routing statistics as sums; `balance_metrics` reads them.

    label_mask: [B, T]; segments: [B, T]; weight: [B], the weight of each sequence, by default its
    number of label tokens. Returns

    balance: [2], sum of loss times weight, and sum of weights; the only one with a gradient.
    expert_tokens: [L, E], number of tokens that chose each expert.
    router_entropy: [2], summed entropy in nats over layers and tokens, and the number of terms.
    routed_tokens: scalar, the total that `expert_tokens` must add up to.
    """
    mask = padding_mask(label_mask, segments)  # [B, T]
    weight = (label_mask.sum(1) if weight is None else weight).float()  # [B]
    logits = torch.stack(routing.logits)  # [L, B, T, E]
    chosen = torch.stack(routing.chosen)  # [L, B, T, K]
    num_experts, num_chosen = logits.shape[-1], chosen.shape[-1]
    # --8<-- [start:balance-loss]
    logprobs = logits.log_softmax(-1)  # [L, B, T, E]
    probs = logprobs.exp() * mask.unsqueeze(-1)  # [L, B, T, E]
    choices = torch.zeros_like(logits).scatter_(-1, chosen, 1.0) * mask.unsqueeze(-1)
    counts = choices.sum(2)  # [L, B, E]
    num_tokens = mask.sum(1).clamp(min=1)[:, None]  # [B, 1]
    f, p = counts / (num_chosen * num_tokens), probs.sum(2) / num_tokens  # [L, B, E] each
    loss = num_experts * (f * p).sum(-1).mean(0)  # [B], the mean over layers
    # --8<-- [end:balance-loss]
    entropy = -(probs.detach() * logprobs.detach()).sum()
    num_routed = mask.sum() * len(logits)
    return {
        "balance": torch.stack(((loss * weight).sum(), weight.sum())),
        "expert_tokens": counts.sum(1).long(),
        "router_entropy": torch.stack((entropy, num_routed.float())),
        "routed_tokens": num_routed * num_chosen,
    }


def balance_metrics(sums: dict[str, Any]) -> dict[str, float]:
    """Compute metrics from the totals of `balance_sums`.

    balance_loss: mean of the balance loss.
    expert_load/e: fraction of all choices, averaged over layers; uniform is 1 / E.
    expert_load/max, /min: over the experts of every layer, since equal indices in different layers
    are different experts.
    router_entropy: nats per token; ln E for a uniform router.
    dropped_tokens: choices that no expert computed. Sorting tokens by expert drops none.
    """
    layers: list[list[int]] = sums["expert_tokens"]
    totals = [max(sum(layer), 1) for layer in layers]
    loads = [
        [count / total for count in layer] for layer, total in zip(layers, totals, strict=True)
    ]
    all_loads = [load for layer in loads for load in layer]
    loss, weight = sums["balance"]
    entropy, num_routed = sums["router_entropy"]
    return (
        {"balance_loss": loss / max(weight, 1.0)}
        | {f"expert_load/{e}": sum(x) / len(x) for e, x in enumerate(zip(*loads, strict=True))}
        | {"expert_load/max": max(all_loads), "expert_load/min": min(all_loads)}
        | {"router_entropy": entropy / max(num_routed, 1.0)}
        | {"dropped_tokens": sums["routed_tokens"] - sum(map(sum, layers))}
    )


def with_balance(
    loss_sum: Tensor,
    coefficient: float,
    routing: Routing,
    label_mask: Tensor,
    segments: Tensor | None,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the weighted balance loss to an objective's loss sum; return it and `balance_sums`."""
    sums = balance_sums(routing, label_mask, segments, weight)
    loss_sum = loss_sum + coefficient * sums["balance"][0]
    return loss_sum, {name: value.detach() for name, value in sums.items()}


def without_balance(
    loss: float, coefficient: float, sums: dict[str, Any]
) -> tuple[float, dict[str, float]]:
    """Subtract the weighted balance loss from a mean loss; return it and `balance_metrics`.

    For a dense model the loss is unchanged and there are no metrics.
    """
    if "balance" not in sums:
        return loss, {}
    metrics = balance_metrics(sums)
    return loss - coefficient * metrics["balance_loss"], metrics
