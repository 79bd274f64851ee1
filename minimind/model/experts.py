"""Mixture of experts (MoE): each token passes through a few of many feed-forward layers.

Shared experts process every token; a router chooses a few routed experts per token (Dai et al.
2024, DeepSeekMoE). Computation and parameter names are those of transformers' GraniteMoeShared
class, so that a state dict can be saved as it is.

That class has no bias on its router. Balancing without an auxiliary loss needs one (Wang et al.
2024) and could not be saved, so experts are balanced by an auxiliary loss:
`minimind/training/objectives/balance.py`.

Shapes: B sequences, T tokens per sequence, N = B * T tokens, E routed experts, K experts chosen
per token, R = N * K rows (one per pair of token and chosen expert), `inner` the width of an expert.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.config.model import ModelConfig
from minimind.model.feed_forward import swiglu
from minimind.model.linear import Linear, linear
from minimind.model.padding import padding_to_multiple

_MAX_UNPADDED_ROWS = 64


@dataclass
class Routing:
    """Decisions of the routers in one forward pass, one tensor per layer.

    logits: [B, T, E] float32. chosen: [B, T, K] int64 expert indices.
    """

    logits: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)


class SharedExperts(nn.Module):
    """Experts for every token, computed as one SwiGLU layer: [..., hidden] -> [..., hidden]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.shared_intermediate_size
        self.input_linear = Linear(config.hidden_size, 2 * inner)
        self.output_linear = Linear(inner, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_linear(_swiglu(self.input_linear(x)))


class RoutedExperts(nn.Module):
    """Router and the K experts it chooses for each token: [B, T, hidden] -> [B, T, hidden]."""

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
        # --8<-- [start:route]
        logits = self.router(x)  # [B, T, E]
        top_logits, chosen = logits.topk(self.num_chosen, dim=-1)  # [B, T, K] each
        if routing is not None:
            routing.logits.append(logits)
            routing.chosen.append(chosen)
        weights = top_logits.softmax(-1).to(x.dtype)  # [B, T, K]
        # --8<-- [end:route]
        out = moe(
            x.flatten(0, 1),  # [N, hidden]
            chosen.flatten(0, 1),  # [N, K]
            weights.flatten(0, 1),  # [N, K]
            self.input_linear.weight,
            self.output_linear.weight,
        )
        return out.view_as(x)  # [N, hidden] -> [B, T, hidden]


class Router(nn.Module):
    """Linear router: [..., hidden] -> logits [..., E], in float32 even under autocast.

    Small differences between logits decide which expert is chosen.
    """

    def __init__(self, hidden: int, experts: int) -> None:
        super().__init__()
        self.layer = nn.Linear(hidden, experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.layer.weight.float())


class ExpertMatrices(nn.Module):
    """One weight matrix per expert: `weight` [E, out, in]."""

    def __init__(self, experts: int, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features))


def moe_reference(
    x: Tensor, chosen: Tensor, weights: Tensor, input_weight: Tensor, output_weight: Tensor
) -> Tensor:
    """Compute `moe` directly from the definition, at E / K times the cost.

    Every expert processes every token. Its output is multiplied by the router's weight, which is
    0 where the expert was not chosen.
    """
    # --8<-- [start:reference]
    out = torch.zeros_like(x)
    for expert, (w_in, w_out) in enumerate(zip(input_weight, output_weight, strict=True)):
        weight = (weights * (chosen == expert)).sum(-1, keepdim=True)  # [N, 1]
        out = out + F.linear(_swiglu(F.linear(x, w_in)), w_out) * weight
    return out
    # --8<-- [end:reference]


def moe(
    x: Tensor, chosen: Tensor, weights: Tensor, input_weight: Tensor, output_weight: Tensor
) -> Tensor:
    """Return the weighted sum of each token's chosen experts, [N, hidden].

    x: [N, hidden]. chosen: [N, K] int64. weights: [N, K]. input_weight: [E, 2 * inner, hidden],
    gate projection above up projection. output_weight: [E, hidden, inner].

    Rows are sorted by expert, so that each expert computes one matrix product over its own rows.
    No token is dropped, however unbalanced the experts are.
    """
    num_chosen = chosen.shape[1]
    # --8<-- [start:sorted]
    # [N, K] each; the outputs of a token's experts are summed in the order of experts.
    chosen, permutation = chosen.sort(dim=-1)
    weights = weights.gather(-1, permutation)
    row_experts, order = chosen.flatten().sort(stable=True)  # [R] each
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    rows = _Permute.apply(x, order, inverse, num_chosen)  # [R, hidden], sorted by expert
    if _supports_grouped_mm(rows, output_weight):
        rows = moe_grouped_mm(rows, row_experts, input_weight, output_weight)
    else:
        rows = moe_loop(rows, row_experts, input_weight, output_weight)
    rows = _Permute.apply(rows, inverse, order, 1)  # [R, hidden], in the order of tokens
    rows = rows.unflatten(0, (-1, num_chosen))  # [N, K, hidden]
    return (rows * weights.unsqueeze(-1)).sum(1)  # [N, hidden]
    # --8<-- [end:sorted]


def _supports_grouped_mm(rows: Tensor, output_weight: Tensor) -> bool:
    """Return True if `F.grouped_mm` works: NVIDIA Ampere or later, and rows aligned to 16 bytes.

    `torch.compile` traces it in bf16 only.
    """
    device = rows.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    if torch.compiler.is_compiling() and _autocast_dtype(rows) != torch.bfloat16:
        return False
    return all(size % 8 == 0 for size in output_weight.shape[1:])


def moe_loop(
    rows: Tensor, row_experts: Tensor, input_weight: Tensor, output_weight: Tensor
) -> Tensor:
    """Apply each expert's SwiGLU to its rows in a loop over experts.

    rows: [R, hidden], sorted by expert. row_experts: [R], the expert of each row. The loop needs
    the row counts on the host, which would synchronize a GPU; `moe_grouped_mm` does not.
    """
    counts = row_experts.bincount(minlength=len(input_weight)).tolist()
    outputs = [
        linear(_swiglu(linear(_pad_rows(expert_rows), w_in)), w_out)[: len(expert_rows)]
        for expert_rows, w_in, w_out in zip(
            rows.split(counts), input_weight.unbind(), output_weight.unbind(), strict=True
        )
        if len(expert_rows)
    ]
    return torch.cat(outputs)  # [R, hidden]


def _pad_rows(rows: Tensor) -> Tensor:
    """Pad more than 64 rows with zeros to a multiple of 64; `padding.py` explains why."""
    padding = padding_to_multiple(len(rows)) if len(rows) > _MAX_UNPADDED_ROWS else 0
    return F.pad(rows, (0, 0, 0, padding)) if padding else rows


def moe_grouped_mm(
    rows: Tensor, row_experts: Tensor, input_weight: Tensor, output_weight: Tensor
) -> Tensor:
    """Compute `moe_loop` with two grouped matrix products.

    In bf16 on NVIDIA Hopper and later, the row counts stay on the device. For other dtypes and
    older devices, PyTorch itself synchronizes once per product.
    """
    dtype = _autocast_dtype(rows)
    experts = torch.arange(len(input_weight), device=rows.device)
    ends = torch.searchsorted(row_experts, experts, right=True).int()  # [E]
    inner = _swiglu(_GroupedMM.apply(rows.to(dtype), input_weight.to(dtype), ends))  # [R, inner]
    out: Tensor = _GroupedMM.apply(inner, output_weight.to(dtype), ends)  # [R, hidden]
    return out


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a matrix product with x: that of autocast, if it is enabled."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _swiglu(x: Tensor) -> Tensor:
    """Multiply the second half of the features by SiLU of the first: [..., 2 * n] -> [..., n]."""
    return swiglu(*x.chunk(2, dim=-1))


class _Permute(torch.autograd.Function):
    """Gather rows: [n, width] -> [n * copies, width]; output row i is row order[i] // copies.

    `inverse` is the inverse permutation of `order`. The gradient is gathered too. PyTorch's own
    backward would scatter-add row by row, which is slow on a CPU and nondeterministic on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, order // copies if copies > 1 else order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = grads[0].index_select(0, inverse)
        grad = grad.unflatten(0, (-1, ctx.copies)).sum(1)  # [n, copies, width] -> [n, width]
        return grad, None, None, None


class _GroupedMM(torch.autograd.Function):
    """Multiply rows [R, in], sorted by expert, by each expert's weight: -> [R, out].

    weight: [E, out, in]. ends: [E], the end of each expert's rows. On some devices PyTorch's own
    backward leaves the weight gradient of an expert without rows uninitialized (pytorch issue
    172439), so the backward is written out and sets it to zero.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        return F.grouped_mm(rows, weight.mT, offs=ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, ends = ctx.saved_tensors
        grad = grads[0].contiguous()
        weight_grad = F.grouped_mm(grad.mT, rows, offs=ends)  # [E, out, in]
        has_no_rows = ends.diff(prepend=ends.new_zeros(1)) == 0  # [E]
        weight_grad = weight_grad.masked_fill(has_no_rows[:, None, None], 0.0)
        return F.grouped_mm(grad, weight, offs=ends), weight_grad, None
