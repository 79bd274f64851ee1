"""Batches of windows: built in a thread one ahead, and copied to the device as tensors."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minimind.data.packing import IGNORED, Batch, MixedDataset


@dataclass(frozen=True)
class TensorPairs:
    """side_ids: [B, T] int64; reference: [P, 2] float32, as `data.packing.Pairs` has them."""

    side_ids: Tensor
    reference: Tensor


@dataclass(frozen=True)
class TensorBatch:
    """tokens, labels: [B, T] int64; segments: [B, T] int32 or None; pairs of preference data.

    learned: [N] int64, the places in [B * T] whose labels are learned, in order. A GPU that was
    asked for them would have to be waited for. num_tokens: how many tokens are no padding.
    """

    tokens: Tensor
    labels: Tensor
    segments: Tensor | None
    learned: Tensor
    pairs: TensorPairs | None = None
    num_tokens: int = 0


def label_indices(labels: Tensor) -> Tensor:
    """`TensorBatch.learned` of labels [B, T] in the CPU's memory."""
    return (labels.flatten() != IGNORED).nonzero()[:, 0]


def to_device(batch: Batch, device: torch.device) -> TensorBatch:
    """Copy a batch to the device; to a GPU from pinned memory, without waiting for the copy."""

    def move(host: Tensor) -> Tensor:
        host = host.pin_memory() if device.type == "cuda" else host
        return host.to(device, non_blocking=True)

    def moved(array: object) -> Tensor:
        return move(torch.from_numpy(array))

    pairs = batch.pairs
    return TensorBatch(
        moved(batch.tokens),
        moved(batch.labels),
        None if batch.segments is None else moved(batch.segments),
        move(label_indices(torch.from_numpy(batch.labels))),
        None if pairs is None else TensorPairs(moved(pairs.side_ids), moved(pairs.reference)),
        _count_tokens(batch),
    )


def _count_tokens(batch: Batch) -> int:
    """Count the tokens that are no padding: of packed windows the last segment, without labels."""
    if batch.segments is None:
        return batch.tokens.size
    last = np.where(batch.labels != IGNORED, batch.segments, -1).max(1, keepdims=True)
    return int((batch.segments <= last).sum())


class Prefetcher:
    """Builds batches of a mix in a thread, one ahead of the one in use.

    The thread works on NumPy arrays alone, so that it takes no processor from torch's threads.
    """

    def __init__(self, mix: MixedDataset) -> None:
        self._mix = mix
        self._thread = ThreadPoolExecutor(1, "minimind-batches")
        self._ahead: tuple[tuple[int, int], Future[Batch]] | None = None

    def batch(self, part: tuple[int, int], following: tuple[int, int] | None) -> Batch:
        """Return `part`, (first sample, number of samples), and start to build the `following` one.

        Raises what building `part` has raised.
        """
        if self._ahead is None or self._ahead[0] != part:
            self._start(part)
        assert self._ahead is not None
        batch = self._ahead[1].result()
        if following is not None:
            self._start(following)
        return batch

    def _start(self, part: tuple[int, int]) -> None:
        if self._ahead:
            self._ahead[1].cancel()
        self._ahead = part, self._thread.submit(self._mix.batch, *part)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)
