"""Next-token prediction: the objective of pretraining and of supervised fine-tuning.

The loss is the cross-entropy of the labels, in nats per token. Fine-tuning is the same loss with a
loss mask: tokens whose label is IGNORED do not count.

Why bits per byte. The loss per token depends on the tokenizer: with a larger vocabulary the same
text is fewer and harder predictions, so the loss per token is higher although the model may be
better. The total loss of the text and its length in bytes do not depend on how it is split into
tokens. Their ratio can therefore be compared across tokenizers and vocabulary sizes:

    bits per byte = (sum of the losses in nats) / ln 2 / (UTF-8 bytes of the labels)

It is also the size to which the model could compress the text, in bits per byte of input. Control
tokens stand for no bytes, so neither their loss nor their length counts.

Shapes: B sequences of T tokens; N label tokens among the B * T; D hidden size; V vocabulary size.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.data.packing import IGNORED
from minimind.model import Transformer, fused
from minimind.model.experts import Routing
from minimind.model.padding import padding_to_multiple
from minimind.training.batch import TensorBatch
from minimind.training.objectives import LossOutput
from minimind.training.objectives.balance import with_balance, without_balance

LOGIT_CHUNK = 1024  # tokens whose logits [LOGIT_CHUNK, V] are in memory at the same time


class NextToken:
    """Cross-entropy of the label tokens, in nats, plus a load-balancing loss for MoE models."""

    count_name = "num_label_tokens"

    def __init__(
        self, token_bytes: list[int], device: torch.device, *, router_aux_loss_coef: float = 0.0
    ) -> None:
        """Set the byte length of each token and the coefficient of the load-balancing loss.

        token_bytes[id]: number of UTF-8 bytes of the token, 0 for control tokens.
        """
        self._router_aux_loss_coef = router_aux_loss_coef
        self._token_bytes = torch.tensor(token_bytes, dtype=torch.float32, device=device)  # [V]

    def loss(self, model: Transformer, batch: TensorBatch) -> LossOutput:
        """Sum the loss over the N label tokens; also the nats and bytes of those that are text.

        For an MoE model the loss includes the weighted load-balancing loss.
        """
        routing = Routing() if model.config.num_local_experts else None
        hidden = model(
            batch.tokens, segments=batch.segments, bounds=batch.bounds, routing=routing
        )  # [B, T, D]
        labels = batch.labels.flatten()[batch.label_indices]  # [N]
        # Only label tokens go through the head: in fine-tuning that is about half of them.
        hidden = hidden.flatten(0, 1).index_select(0, batch.label_indices)  # [N, D]
        losses = linear_cross_entropy(hidden, model.head_weight, labels)  # [N]
        num_bytes = self._token_bytes[labels]  # [N]
        nats = (losses.detach() * (num_bytes > 0)).sum()
        loss_sum, sums = losses.sum(), {"nats": nats, "bytes": num_bytes.sum()}
        if routing:
            loss_sum, balance = with_balance(
                loss_sum,
                self._router_aux_loss_coef,
                routing,
                batch.labels != IGNORED,
                batch.segments,
            )
            sums |= balance
        return LossOutput(loss_sum, torch.tensor(len(labels)), sums)

    def metrics(self, loss: float, sums: dict[str, Any]) -> dict[str, float]:
        """Return the mean loss in nats per token, bits per byte, and MoE metrics.

        The load-balancing loss is subtracted, so that the loss compares with a dense model's.
        """
        # --8<-- [start:bits-per-byte]
        num_bytes = max(sums["bytes"], 1.0)
        bits = sums["nats"] / math.log(2) / num_bytes
        # --8<-- [end:bits-per-byte]
        loss, balance = without_balance(loss, self._router_aux_loss_coef, sums)
        return {"loss": loss, "bits_per_byte": bits} | balance

    def note(self, metrics: dict[str, float]) -> str:
        """Format the loss."""
        return f"loss {metrics['loss']:.3f}"

    def warning(self, progress: float, metrics: dict[str, float]) -> str | None:
        """Return None: no problem is detected from these metrics."""
        return None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, uniform_grad: bool = True
) -> Tensor:
    """Cross-entropy [N] in nats of the logits hidden [N, D] @ weight[V, D].T and labels [N].

    The logits are computed in chunks of LOGIT_CHUNK tokens, overwritten with their own gradient,
    and freed. This needs less memory than logits for all tokens, and half the time on a CPU.

    uniform_grad: assume that the upstream gradient is the same for every loss, as in a sum; the
    gradient can then be computed in the forward pass. Pass False where the factors differ: the
    logits are computed again in the backward pass, when the factors are known.
    """
    is_autocast = torch.is_autocast_enabled(hidden.device.type)
    dtype = torch.get_autocast_dtype(hidden.device.type) if is_autocast else hidden.dtype
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    num_labels, padding = len(labels), padding_to_multiple(len(labels))
    if padding:  # rows of zeros, which add nothing to any gradient
        hidden, labels = F.pad(hidden, (0, 0, 0, padding)), F.pad(labels, (0, padding))
    losses: Tensor = _LinearCrossEntropy.apply(
        hidden, weight, labels, dtype, needs_grad, weight.requires_grad, uniform_grad
    )
    return losses[:num_labels]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        labels: Tensor,  # [N]
        dtype: torch.dtype,
        needs_grad: bool,
        trains_weight: bool,  # False for LoRA, where the head is frozen
        uniform_grad: bool,
    ) -> Tensor:
        ctx.uniform_grad, ctx.trains_weight = uniform_grad, trains_weight
        ctx.hidden_dtype = hidden.dtype
        half_weight, half_hidden = weight.to(dtype), hidden.to(dtype)
        losses, *grads = _losses_by_chunks(
            half_hidden, half_weight, labels, None, needs_grad and uniform_grad, trains_weight
        )
        if needs_grad:
            ctx.save_for_backward(*(grads if uniform_grad else (half_hidden, half_weight, labels)))
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        factors = upstream[0]  # [N]
        if ctx.uniform_grad:
            hidden_grad, *weight_grad = ctx.saved_tensors
            factor = factors[0] if len(factors) else 0.0  # the same for every loss
            hidden_grad, weight_grad = hidden_grad * factor, [x * factor for x in weight_grad]
        else:
            hidden, weight, labels = ctx.saved_tensors
            _, hidden_grad, *weight_grad = _losses_by_chunks(
                hidden, weight, labels, factors, True, ctx.trains_weight
            )
        grads = hidden_grad.to(ctx.hidden_dtype), weight_grad[0] if weight_grad else None
        return *grads, None, None, None, None, None


def _losses_by_chunks(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    factors: Tensor | None,
    needs_grad: bool,
    trains_weight: bool,
) -> list[Tensor]:
    """Compute [losses [N]], and the gradients of hidden [N, D] and weight [V, D] where needed.

    factors: [N], the upstream gradient of each loss; None = 1. The gradient of the weight is
    accumulated in float32.
    """
    losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)  # [N]
    grads = []
    if needs_grad:
        grads = [torch.empty_like(hidden)]  # [N, D]
        grads += [torch.zeros_like(weight, dtype=torch.float32)] * trains_weight  # [V, D]
    uses_amx = fused.takes_weight_grad(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(labels), LOGIT_CHUNK):
            chunk = slice(start, start + LOGIT_CHUNK)  # C tokens
            rows = hidden[chunk]  # [C, D]
            factor = None if factors is None else factors[chunk]
            losses[chunk], grad = _cross_entropy(rows @ weight.T, labels[chunk], factor)
            if needs_grad:
                grads[0][chunk] = grad @ weight
                if trains_weight and uses_amx:
                    fused.weight_grad(grad, rows, grads[1])
                elif trains_weight:
                    grads[1] += grad.T @ rows
    return [losses, *grads]


def _cross_entropy(logits: Tensor, labels: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the losses [C] and the gradient [C, V] of the logits, in their dtype.

    The gradient is softmax(logits) - one_hot(label), times the factor [C]. The logits are
    overwritten.
    """
    if fused.takes(logits):
        return fused.cross_entropy_(logits, labels, factors), logits
    dtype, targets = logits.dtype, labels[:, None]  # [C, 1]
    # --8<-- [start:cross-entropy]
    logprobs = torch.log_softmax(logits.float(), -1)  # [C, V]
    losses = -logprobs.gather(1, targets)[:, 0]
    # --8<-- [end:cross-entropy]
    # --8<-- [start:cross-entropy-gradient]
    minus_one = torch.full(targets.shape, -1.0, device=targets.device)
    grad = logprobs.exp_().scatter_add_(1, targets, minus_one)  # [C, V]
    # --8<-- [end:cross-entropy-gradient]
    if factors is not None:
        grad *= factors[:, None]
    return losses, grad.to(dtype)
