"""Next-token prediction: pretraining and, where only some tokens carry labels, fine-tuning."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.data.packing import IGNORED
from minimind.model import Transformer
from minimind.model.experts import Routing
from minimind.model.padding import padding_to_multiple
from minimind.training.batch import TensorBatch
from minimind.training.objectives.balance import with_balance, without_balance

LOGIT_CHUNK = 1024  # tokens whose logits exist at once


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
        hidden = model(batch.tokens, segments=batch.segments, routing=routing).flatten(0, 1)
        labels = batch.labels.flatten()[batch.learned]
        # Only what is learned goes through the head: in fine-tuning that is about half.
        learned = hidden.index_select(0, batch.learned)
        losses = linear_cross_entropy(learned, model.head_weight, labels)
        num_bytes = self._token_bytes[labels]
        nats = (losses.detach() * (num_bytes > 0)).sum()
        total, sums = losses.sum(), {"nats": nats, "bytes": num_bytes.sum()}
        if routing:
            total, more = with_balance(
                total, self._router_balance, routing, batch.labels != IGNORED, batch.segments
            )
            sums |= more
        return total, torch.tensor(len(labels)), sums

    def metrics(self, loss: float, sums: dict[str, Any]) -> dict[str, float]:
        """Mean loss in nats a token, and bits per byte of text (control tokens are none).

        The loss is that of the tokens alone, so that it compares with a dense model's.
        """
        num_bytes = max(sums["bytes"], 1.0)
        bits = sums["nats"] / math.log(2) / num_bytes
        loss, more = without_balance(loss, self._router_balance, sums)
        return {"loss": loss, "bits_per_byte": bits} | more

    def note(self, metrics: dict[str, float]) -> str:
        return f"loss {metrics['loss']:.3f}"

    def warning(self, share: float, metrics: dict[str, float]) -> str | None:
        return None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, uniform_grad: bool = True
) -> Tensor:
    """Cross-entropy [N] in nats of hidden [N, width] @ weight[vocab, width].T against labels [N].

    The logits of a few tokens at a time are made, turned into their own gradient in place, and
    dropped: less memory than logits for all, and on a CPU half the time. The gradient is that of
    the sum of the losses: what flows back must be the same factor for each. Where it is not, with
    `alike=False`, the logits are made once more when the factors are known.
    """
    dtype = torch.get_autocast_dtype(hidden.device.type) if _is_autocast(hidden) else hidden.dtype
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    trained = weight.requires_grad  # the head is not, where adapters are
    number, short = len(labels), padding_to_multiple(len(labels))
    if short:  # rows of zeros: they add nothing to any gradient
        hidden, labels = F.pad(hidden, (0, 0, 0, short)), F.pad(labels, (0, short))
    losses: Tensor = _LinearCrossEntropy.apply(
        hidden, weight, labels, dtype, wanted, trained, uniform_grad
    )
    return losses[:number]


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
        uniform_grad: bool,
    ) -> Tensor:
        ctx.uniform_grad, ctx.trained, ctx.hidden_dtype = uniform_grad, trained, hidden.dtype
        half_weight, half_hidden = weight.to(dtype), hidden.to(dtype)
        losses, *grads = _by_chunks(
            half_hidden, half_weight, labels, None, wanted and uniform_grad, trained
        )
        if wanted:
            ctx.save_for_backward(*(grads if uniform_grad else (half_hidden, half_weight, labels)))
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.uniform_grad:
            hidden_grad, *weight_grad = ctx.saved_tensors
            factor = grads[0][0] if len(grads[0]) else 0.0  # the same for every loss
            hidden_grad, weight_grad = hidden_grad * factor, [x * factor for x in weight_grad]
        else:
            hidden, weight, labels = ctx.saved_tensors
            _, hidden_grad, *weight_grad = _by_chunks(
                hidden, weight, labels, grads[0], True, ctx.trained
            )
        first = hidden_grad.to(ctx.hidden_dtype), weight_grad[0] if weight_grad else None
        return *first, None, None, None, None, None


def _by_chunks(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    factors: Tensor | None,
    wanted: bool,
    trained: bool,
) -> list[Tensor]:
    """[losses], with gradients (if wanted) of hidden and, if trained, of weight, in float32.

    factors: [N] by which the gradient of each loss is multiplied; None = 1.
    """
    losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
    grads = []
    if wanted:
        grads = [torch.empty_like(hidden)]
        grads += [torch.zeros_like(weight, dtype=torch.float32)] * trained
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(labels), LOGIT_CHUNK):
            part = slice(start, start + LOGIT_CHUNK)
            rows, targets = hidden[part], labels[part, None]
            scores = (rows @ weight.T).float()
            scores = torch.log_softmax(scores, -1)
            losses[part] = -scores.gather(1, targets)[:, 0]
            if wanted:
                grad = scores.exp_().scatter_add_(1, targets, _minus_one(targets))
                if factors is not None:
                    grad *= factors[part, None]
                half_grad = grad.to(hidden.dtype)
                grads[0][part] = half_grad @ weight
                if trained:
                    grads[1] += half_grad.T @ rows
    return [losses, *grads]


def _minus_one(targets: Tensor) -> Tensor:
    return torch.full(targets.shape, -1.0, device=targets.device)
