"""The mixture of experts: feed-forward layers of which each token uses only some.

Shared experts that every token uses and routed ones that a router chooses (Dai et al. 2024,
DeepSeekMoE), computed and named as transformers' GraniteMoeShared class does, so that what is in
memory is what is on disk. N tokens, E experts, K of them chosen for each token.

That class has no bias on its router, so balancing without an auxiliary loss, which needs one
(Wang et al. 2024), could not be written to disk; experts are balanced by a loss instead:
minimind/training/objectives/balance.py.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.config.model import ModelConfig
from minimind.model.rows import padding_to_multiple

_MANY = 64  # rows from which on their number is rounded


@dataclass
class Routing:
    """What the routers decide in a forward pass, collected by whoever passes one to it.

    A tensor a layer, first layer first. logits: [B, T, E] float32; chosen: [B, T, K] int64.
    """

    logits: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)


class SharedExperts(nn.Module):
    """The experts of every token, side by side as one SwiGLU layer: [..., hidden] -> the same."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.shared_intermediate_size
        self.input_linear = nn.Linear(config.hidden_size, 2 * inner, bias=False)
        self.output_linear = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_linear(_gated(self.input_linear(x)))


class RoutedExperts(nn.Module):
    """The K experts that the router likes best for each token: [B, T, hidden] -> the same."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, inner = (
            config.num_local_experts,
            config.hidden_size,
            config.intermediate_size,
        )
        self.num_chosen = config.num_experts_per_tok
        self.router = Router(hidden, experts)
        self.input_linear = ExpertMatrices(experts, 2 * inner, hidden)
        self.output_linear = ExpertMatrices(experts, hidden, inner)

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        logits = self.router(x)
        best, chosen = logits.topk(self.num_chosen, dim=-1)
        if routing is not None:
            routing.logits.append(logits)
            routing.chosen.append(chosen)
        weights = best.softmax(-1).to(x.dtype)
        out = moe(
            x.flatten(0, 1),
            chosen.flatten(0, 1),
            weights.flatten(0, 1),
            self.input_linear.weight,
            self.output_linear.weight,
        )
        return out.view_as(x)


class Router(nn.Module):
    """[..., hidden] -> logits [..., E] in float32: a choice turns on small differences."""

    def __init__(self, hidden: int, experts: int) -> None:
        super().__init__()
        self.layer = nn.Linear(hidden, experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.layer.weight.float())


class ExpertMatrices(nn.Module):
    """A matrix for each expert: weight [E, out, in]."""

    def __init__(self, experts: int, out: int, into: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out, into))


def moe_reference(
    x: Tensor, chosen: Tensor, weights: Tensor, input_weight: Tensor, output_weight: Tensor
) -> Tensor:
    """What `routed` computes, as the definition has it; E / K times as much work.

    Every expert reads every token, and counts as much as the router says: mostly nothing.
    """
    out = torch.zeros_like(x)
    for expert, (into, back) in enumerate(zip(input_weight, output_weight, strict=True)):
        share = (weights * (chosen == expert)).sum(-1, keepdim=True)
        out = out + F.linear(_gated(F.linear(x, into)), back) * share
    return out


def moe(
    x: Tensor, chosen: Tensor, weights: Tensor, input_weight: Tensor, output_weight: Tensor
) -> Tensor:
    """The chosen experts' outputs [N, hidden], weighted and added up.

    x: [N, hidden]; chosen: [N, K] int64; weights: [N, K]; input_weight: [E, 2 * inner, hidden], a
    gate above what it lets through; output_weight: [E, hidden, inner].

    Tokens are sorted by expert, so that each expert reads its own as one matrix and no token is
    dropped, however uneven the experts' shares are.
    """
    num_chosen = chosen.shape[1]
    chosen, places = chosen.sort(dim=-1)  # added up in the order of the experts
    weights = weights.gather(-1, places)
    by_expert, order = chosen.flatten().sort(stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    rows = _Rows.apply(x, order, back, num_chosen)
    if _has_grouped_products(x.device, output_weight):
        rows = moe_grouped_mm(rows, by_expert, input_weight, output_weight)
    else:
        rows = moe_loop(rows, by_expert, input_weight, output_weight)
    rows = _Rows.apply(rows, back, order, 1).unflatten(0, (-1, num_chosen))
    return (rows * weights.unsqueeze(-1)).sum(1)


def _has_grouped_products(device: torch.device, output_weight: Tensor) -> bool:
    """Torch's need NVIDIA's Ampere or later, and rows that begin at multiples of 16 bytes."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return all(size % 8 == 0 for size in output_weight.shape[1:])


def moe_loop(
    rows: Tensor, by_expert: Tensor, input_weight: Tensor, output_weight: Tensor
) -> Tensor:
    """SwiGLU of rows sorted by expert, an expert after the other.

    Their number has to be known here, which on a GPU would mean to wait for it: see `grouped`.
    """
    counts = by_expert.bincount(minlength=len(input_weight)).tolist()
    parts = [
        F.linear(_gated(F.linear(_rounded(mine), into)), back)[: len(mine)]
        for mine, into, back in zip(
            rows.split(counts), input_weight.unbind(), output_weight.unbind(), strict=True
        )
        if len(mine)
    ]
    return torch.cat(parts)


def _rounded(rows: Tensor) -> Tensor:
    """With rows of zeros up to a round number, once there are many.

    An expert has another number of tokens each time.
    """
    short = padding_to_multiple(len(rows)) if len(rows) > _MANY else 0
    return F.pad(rows, (0, 0, 0, short)) if short else rows


def moe_grouped_mm(
    rows: Tensor, by_expert: Tensor, input_weight: Tensor, output_weight: Tensor
) -> Tensor:
    """The same with two products over all experts, whose borders never leave the device.

    That holds for bf16 from NVIDIA's Hopper on; in other numbers and on older devices torch itself
    waits for the borders, once a product.
    """
    kind = rows.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
    experts = torch.arange(len(input_weight), device=rows.device)
    ends = torch.searchsorted(by_expert, experts, right=True).int()
    inner = _gated(_GroupedProduct.apply(rows.to(dtype), input_weight.to(dtype), ends))
    out: Tensor = _GroupedProduct.apply(inner, output_weight.to(dtype), ends)
    return out


def _gated(x: Tensor) -> Tensor:
    """[..., 2 * inner] -> [..., inner]: the first half decides how much of the second passes."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class _Rows(torch.autograd.Function):
    """Row order[i] // copies of x [N, width] as row i; `back` is the inverse of `order`.

    The gradient is picked up in the same way, where torch's own would add row by row: slow on a
    CPU, and on a GPU in no fixed order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.copies = copies
        return x.index_select(0, order // copies if copies > 1 else order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        grad = grads[0].index_select(0, back)
        return grad.unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


class _GroupedProduct(torch.autograd.Function):
    """rows [n, in], sorted by expert, times each expert's weight.T of [E, out, in] -> [n, out].

    Of an expert without a token torch leaves the gradient's memory as it finds it on some devices
    (pytorch issue 172439), so that this does not lean on torch's own backward.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        return F.grouped_mm(rows, weight.mT, offs=ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, ends = ctx.saved_tensors
        grad = grads[0].contiguous()
        weight_grad = F.grouped_mm(grad.mT, rows, offs=ends)
        idle = ends.diff(prepend=ends.new_zeros(1)) == 0
        weight_grad = weight_grad.masked_fill(idle[:, None, None], 0.0)
        return F.grouped_mm(grad, weight, offs=ends), weight_grad, None
