"""Totals of losses and metrics over micro-batches, steps and processes."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minimind.training.distributed import ProcessGroup
from minimind.training.objectives import LossOutput, Objective


@dataclass
class LossSums:
    """The fields of `LossOutput`, detached and added up; on the device until they are read.

    num_tokens: input tokens without padding.
    """

    loss_sum: Tensor | float = 0.0
    count: Tensor | int = 0
    metric_sums: dict[str, Tensor] = field(default_factory=dict)
    num_tokens: Tensor | int = 0

    @classmethod
    def of(cls, output: LossOutput, num_tokens: int = 0) -> "LossSums":
        """Return the sums of one micro-batch."""
        return cls(output.loss_sum.detach(), output.count, output.metric_sums, num_tokens)

    def add(self, other: "LossSums") -> None:
        """Add the sums of more micro-batches or steps."""
        self.loss_sum = self.loss_sum + other.loss_sum
        self.count = self.count + other.count
        self.num_tokens = self.num_tokens + other.num_tokens
        self.metric_sums = {
            key: self.metric_sums.get(key, 0) + value for key, value in other.metric_sums.items()
        }

    def all_reduce_(self, group: ProcessGroup, device: torch.device) -> None:
        """Sum over all processes, in place. float64 represents every float32 and count exactly."""
        if group.size == 1:
            return
        values = (self.loss_sum, self.count, self.num_tokens, *self.metric_sums.values())
        tensors = [torch.as_tensor(value) for value in values]
        flat = torch.cat([tensor.to(device, torch.float64).flatten() for tensor in tensors])
        group.all_reduce_([flat])
        parts = flat.split([tensor.numel() for tensor in tensors])
        totals = [
            part.view(tensor.shape).to(tensor.dtype)
            for tensor, part in zip(tensors, parts, strict=True)
        ]
        self.loss_sum, self.count, self.num_tokens = totals[:3]
        self.metric_sums = dict(zip(self.metric_sums, totals[3:], strict=True))

    def add_missing_metrics(self, group: ProcessGroup, device: torch.device) -> None:
        """Add zeros for the metrics of rank 0 that this process lacks because it had no samples."""
        shapes = group.broadcast_object(
            {name: list(value.shape) for name, value in self.metric_sums.items()}
        )
        for name, shape in shapes.items():
            self.metric_sums.setdefault(name, torch.zeros(shape, device=device))

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as JSON values; float32 survives the conversion to float exactly."""
        return {
            "loss_sum": float(self.loss_sum),
            "count": int(self.count),
            "metric_sums": {key: value.tolist() for key, value in self.metric_sums.items()},
            "num_tokens": int(self.num_tokens),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> "LossSums":
        """Rebuild the sums on `device`."""
        return cls(
            torch.tensor(state["loss_sum"], device=device),
            torch.tensor(state["count"], device=device),
            {key: torch.tensor(x, device=device) for key, x in state["metric_sums"].items()},
            state["num_tokens"],
        )

    def metrics(self, objective: Objective) -> dict[str, float]:
        """Compute the objective's metrics from the totals."""
        mean = float(self.loss_sum) / max(int(self.count), 1)
        sums = {key: value.tolist() for key, value in self.metric_sums.items()}
        return objective.metrics(mean, sums)
