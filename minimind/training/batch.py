"""A batch of windows as tensors on the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minimind.data.packing import IGNORED, Batch


@dataclass(frozen=True)
class TensorPairs:
    """sequences: [B, T] int64; reference: [P, 2] float32, as `data.packing.Pairs` has them."""

    sequences: Tensor
    reference: Tensor


@dataclass(frozen=True)
class TensorBatch:
    """tokens, labels: [B, T] int64; segments: [B, T] int32 or None; pairs of preference data.

    learned: [N] int64, the places in [B * T] whose labels are learned, in order. A GPU that was
    asked for them would have to be waited for.
    """

    tokens: Tensor
    labels: Tensor
    segments: Tensor | None
    learned: Tensor
    pairs: TensorPairs | None = None


def learned_places(labels: Tensor) -> Tensor:
    """`TensorBatch.learned` of labels [B, T] in the CPU's memory."""
    return (labels.flatten() != IGNORED).nonzero()[:, 0]


def to_device(batch: Batch, device: torch.device) -> TensorBatch:
    """Copy a batch to the device."""

    def move(array: object) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    pairs = batch.pairs
    return TensorBatch(
        move(batch.tokens),
        move(batch.labels),
        None if batch.segments is None else move(batch.segments),
        learned_places(torch.from_numpy(batch.labels)).to(device, non_blocking=True),
        None if pairs is None else TensorPairs(move(pairs.sequences), move(pairs.reference)),
    )
