"""A batch of windows as tensors on the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minimind.data.packing import Batch


@dataclass(frozen=True)
class TensorPairs:
    """sequences: [B, T] int64; reference: [P, 2] float32, as `data.packing.Pairs` has them."""

    sequences: Tensor
    reference: Tensor


@dataclass(frozen=True)
class TensorBatch:
    """tokens, labels: [B, T] int64; segments: [B, T] int32 or None; pairs of preference data."""

    tokens: Tensor
    labels: Tensor
    segments: Tensor | None
    pairs: TensorPairs | None = None


def to_device(batch: Batch, device: torch.device) -> TensorBatch:
    """Copy a batch to the device."""

    def move(array: object) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    pairs = batch.pairs
    return TensorBatch(
        move(batch.tokens),
        move(batch.labels),
        None if batch.segments is None else move(batch.segments),
        None if pairs is None else TensorPairs(move(pairs.sequences), move(pairs.reference)),
    )
