"""Objectives that wrap another one and inject faults."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minimind.model import Transformer
from minimind.training.batch import TensorBatch
from minimind.training.objectives import LossOutput, Objective


def out_of_memory(*_: object) -> Tensor:
    """Raise what PyTorch's CUDA allocator raises."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@dataclass
class Wrapper:
    """Delegates everything to another objective."""

    objective: Objective

    @property
    def count_name(self) -> str:
        return self.objective.count_name

    def loss(self, model: Transformer, batch: TensorBatch) -> LossOutput:
        return self.objective.loss(model, batch)

    def metrics(self, loss: float, sums: dict[str, float]) -> dict[str, float]:
        return self.objective.metrics(loss, sums)

    def note(self, metrics: dict[str, float]) -> str:
        return self.objective.note(metrics)

    def warning(self, progress: float, metrics: dict[str, float]) -> str | None:
        return self.objective.warning(progress, metrics)


@dataclass
class Corrupted(Wrapper):
    """Passes the loss of the given calls, counted from 1, through `corrupt`.

    A step of `nano_trainer` is two calls, one per micro-batch.
    """

    corrupt: Callable[[Tensor], Tensor]
    calls: set[int]
    num_calls: int = 0

    def loss(self, model: Transformer, batch: TensorBatch) -> LossOutput:
        output = self.objective.loss(model, batch)
        self.num_calls += 1
        if self.num_calls not in self.calls:
            return output
        return replace(output, loss_sum=self.corrupt(output.loss_sum))


@dataclass
class LargeInEvaluation(Wrapper):
    """Runs out of memory with more than `max_sequences` in a validation."""

    model: Transformer
    max_sequences: int

    def loss(self, model: Transformer, batch: TensorBatch) -> LossOutput:
        if not self.model.training and len(batch.tokens) > self.max_sequences:
            out_of_memory()
        return self.objective.loss(model, batch)


@dataclass
class PresetValidation(Wrapper):
    """Replaces bits per byte of each validation by the next of the given values."""

    model: Transformer
    values: list[float]

    def metrics(self, loss: float, sums: dict[str, float]) -> dict[str, float]:
        metrics = self.objective.metrics(loss, sums)
        preset = {} if self.model.training else {"bits_per_byte": self.values.pop(0)}
        return metrics | preset


def nan_gradient(loss: Tensor) -> Tensor:
    """Return the same loss, with a gradient that is NaN."""
    return loss + (loss * 0.0).sqrt() * 0.0


def infinite_gradient(loss: Tensor) -> Tensor:
    """Return the same loss, with a gradient that is infinite."""
    return loss + (loss - loss.detach()) * 1e38 * 1e38


CORRUPTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "loss-nan": lambda loss: loss * math.nan,
    "loss-inf": lambda loss: loss * math.inf,
    "gradient-nan": nan_gradient,
    "gradient-inf": infinite_gradient,
}
