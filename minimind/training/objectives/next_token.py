"""Next-token prediction: pretraining and, where only some tokens carry labels, fine-tuning."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.data.packing import IGNORED
from minimind.model import Transformer
from minimind.training.batch import TensorBatch


class NextToken:
    """Cross-entropy of each labelled token, in nats."""

    def __init__(self, token_bytes: list[int], device: torch.device) -> None:
        """`token_bytes[id]`: UTF-8 bytes that the token stands for, 0 for control tokens."""
        self._token_bytes = torch.tensor(token_bytes, dtype=torch.float32, device=device)

    def loss(
        self, model: Transformer, batch: TensorBatch
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum over labelled tokens, their number, and the nats and bytes of those that are text."""
        hidden = model(batch.tokens, segments=batch.segments)
        learned = batch.labels != IGNORED
        labels = batch.labels[learned]
        # Only what is learned goes through the head: in fine-tuning that is about half.
        losses = F.cross_entropy(model.logits(hidden[learned]).float(), labels, reduction="none")
        num_bytes = self._token_bytes[labels]
        nats = (losses.detach() * (num_bytes > 0)).sum()
        return losses.sum(), learned.sum(), {"nats": nats, "bytes": num_bytes.sum()}

    def figures(self, loss: float, sums: dict[str, float]) -> dict[str, float]:
        """Mean loss in nats a token, and bits per byte of text (control tokens count as neither)."""
        num_bytes = max(sums["bytes"], 1.0)
        return {"loss": loss, "bits_per_byte": sums["nats"] / math.log(2) / num_bytes}
