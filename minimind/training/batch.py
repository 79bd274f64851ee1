"""Batches on the device: prefetched by a thread, and copied as tensors.

Shapes: B sequences of T tokens; N label tokens among the B * T; P preference pairs.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minimind.data.packing import IGNORED, Batch, MixedDataset
from minimind.model.varlen import SegmentBounds, segment_offsets, supports_varlen

Samples = tuple[int, int]  # (first sample of the run, number of samples)


@dataclass(frozen=True)
class TensorPairs:
    """`data.packing.Pairs` as tensors: side_ids [B, T] int64, reference [P, 2] float32."""

    side_ids: Tensor
    reference: Tensor


@dataclass(frozen=True)
class TensorBatch:
    """`data.packing.Batch` as tensors.

    tokens, labels: [B, T] int64. segments: [B, T] int32, or None.
    label_indices: [N] int64, ascending positions in the flattened labels [B * T] that are not
    IGNORED. Computed on the host: boolean indexing on a GPU would wait for the device.
    pairs: for preference data. num_tokens: number of tokens without padding.
    bounds: the borders of the segments, where variable-length attention works.
    """

    tokens: Tensor
    labels: Tensor
    segments: Tensor | None
    label_indices: Tensor
    pairs: TensorPairs | None = None
    num_tokens: int = 0
    bounds: SegmentBounds | None = None


def label_indices(labels: Tensor) -> Tensor:
    """Return `TensorBatch.label_indices` [N] of labels [B, T] in host memory."""
    return (labels.flatten() != IGNORED).nonzero()[:, 0]


def to_device(batch: Batch, device: torch.device) -> TensorBatch:
    """Copy a batch to the device. Copies to a GPU are asynchronous, from pinned memory."""

    def copy(array: object) -> Tensor:
        host = torch.as_tensor(array)
        host = host.pin_memory() if device.type == "cuda" else host
        return host.to(device, non_blocking=True)

    pairs, bounds = batch.pairs, None
    if batch.segments is not None and supports_varlen(device):
        offsets = copy(segment_offsets(batch.segments))
        bounds = SegmentBounds(offsets, longest=batch.tokens.shape[1])
    return TensorBatch(
        tokens=copy(batch.tokens),
        labels=copy(batch.labels),
        segments=None if batch.segments is None else copy(batch.segments),
        label_indices=copy(label_indices(torch.from_numpy(batch.labels))),
        pairs=None if pairs is None else TensorPairs(copy(pairs.side_ids), copy(pairs.reference)),
        num_tokens=_count_tokens(batch),
        bounds=bounds,
    )


def _count_tokens(batch: Batch) -> int:
    """Count the tokens without padding, which is the last segment of a sequence, without labels."""
    if batch.segments is None:
        return batch.tokens.size
    last = np.where(batch.labels != IGNORED, batch.segments, -1).max(1, keepdims=True)  # [B, 1]
    return int((batch.segments <= last).sum())


class Prefetcher:
    """Builds batches in a background thread, one ahead of the batch in use.

    The thread only runs NumPy code, so that it does not compete with torch's thread pool.
    """

    def __init__(self, dataset: MixedDataset) -> None:
        self._dataset = dataset
        self._thread = ThreadPoolExecutor(1, "minimind-batches")
        self._pending: tuple[Samples, Future[Batch]] | None = None

    def batch(self, samples: Samples, following: Samples | None) -> Batch:
        """Return the batch of `samples`, and start to build that of the `following` ones.

        Raises what building this batch raised; errors of a batch that is never used are dropped.
        """
        if self._pending is None or self._pending[0] != samples:
            self._start(samples)
        assert self._pending is not None
        batch = self._pending[1].result()
        if following is not None:
            self._start(following)
        return batch

    def _start(self, samples: Samples) -> None:
        if self._pending:
            self._pending[1].cancel()
        self._pending = samples, self._thread.submit(self._dataset.batch, *samples)

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(cancel_futures=True)
