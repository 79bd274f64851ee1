"""Next-token prediction: pretraining and, where only some tokens carry labels, fine-tuning."""

import math
from typing import Any

import torch
from torch import Tensor

from minimind.data.packing import IGNORED
from minimind.model import Transformer
from minimind.model.experts import Routing
from minimind.training.batch import TensorBatch
from minimind.training.objectives.balance import balance_figures, balance_sums

_CHUNK = 1024  # tokens whose logits exist at once


class NextToken:
    """Cross-entropy of each labelled token, in nats; experts, if there are any, are balanced."""

    def __init__(
        self, token_bytes: list[int], device: torch.device, *, router_balance: float = 0.0
    ) -> None:
        """`token_bytes[id]`: UTF-8 bytes that the token stands for, 0 for control tokens."""
        self._router_balance = router_balance
        self._token_bytes = torch.tensor(token_bytes, dtype=torch.float32, device=device)

    def loss(
        self, model: Transformer, batch: TensorBatch
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum over labelled tokens, their number, and the nats and bytes of those that are text.

        Of a mixture of experts the first has the weighted balance loss in it.
        """
        routing = Routing() if model.config.num_local_experts else None
        hidden = model(batch.tokens, segments=batch.segments, routing=routing)
        learned = batch.labels != IGNORED
        labels = batch.labels[learned]
        # Only what is learned goes through the head: in fine-tuning that is about half.
        losses = linear_cross_entropy(hidden[learned], model.head_weight, labels)
        num_bytes = self._token_bytes[labels]
        nats = (losses.detach() * (num_bytes > 0)).sum()
        total, sums = losses.sum(), {"nats": nats, "bytes": num_bytes.sum()}
        if routing:
            more = balance_sums(routing, learned, batch.segments)
            total = total + self._router_balance * more["balance"][0]
            sums |= {name: value.detach() for name, value in more.items()}
        return total, learned.sum(), sums

    def figures(self, loss: float, sums: dict[str, Any]) -> dict[str, float]:
        """Mean loss in nats a token, and bits per byte of text (control tokens are none).

        The loss is that of the tokens alone, so that it compares with a dense model's.
        """
        num_bytes = max(sums["bytes"], 1.0)
        bits = sums["nats"] / math.log(2) / num_bytes
        if "balance" not in sums:
            return {"loss": loss, "bits_per_byte": bits}
        more = balance_figures(sums)
        loss -= self._router_balance * more["balance"]
        return {"loss": loss, "bits_per_byte": bits} | more


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [N] in nats of hidden [N, width] @ weight[vocab, width].T against labels [N].

    The logits of a few tokens at a time are made, turned into their own gradient in place, and
    dropped: less memory than logits for all, and on a CPU half the time. The gradient is that of
    the sum of the losses: what flows back must be the same factor for each.
    """
    dtype = torch.get_autocast_dtype(hidden.device.type) if _is_autocast(hidden) else hidden.dtype
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    trained = weight.requires_grad  # the head is not, where adapters are
    losses: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, dtype, wanted, trained)
    return losses


def _is_autocast(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        dtype: torch.dtype,
        wanted: bool,
        trained: bool,
    ) -> Tensor:
        half_weight, half_hidden = weight.to(dtype), hidden.to(dtype)
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        if wanted:
            hidden_grad = torch.empty_like(half_hidden)
            weight_grad = torch.zeros_like(weight, dtype=torch.float32) if trained else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(labels), _CHUNK):
                part = slice(start, start + _CHUNK)
                rows, targets = half_hidden[part], labels[part, None]
                scores = (rows @ half_weight.T).float()
                scores = torch.log_softmax(scores, -1)
                losses[part] = -scores.gather(1, targets)[:, 0]
                if wanted:
                    grad = scores.exp_().scatter_add_(1, targets, _minus_one(targets))
                    half_grad = grad.to(dtype)
                    hidden_grad[part] = half_grad @ half_weight
                    if weight_grad is not None:
                        weight_grad += half_grad.T @ rows
        if wanted:
            ctx.save_for_backward(hidden_grad, weight_grad)
            ctx.hidden_dtype = hidden.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        factor = grads[0][0] if len(grads[0]) else 0.0  # the same for every loss
        if weight_grad is not None:
            weight_grad = weight_grad * factor
        return (hidden_grad * factor).to(ctx.hidden_dtype), weight_grad, None, None, None, None


def _minus_one(targets: Tensor) -> Tensor:
    return torch.full(targets.shape, -1.0, device=targets.device)
