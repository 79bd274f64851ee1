"""Sums of losses and metrics over micro-batches, steps and processes."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minimind.training.distributed import ProcessGroup
from minimind.training.objectives import Objective


@dataclass
class LossSums:
    """Losses, their number, and what else an objective adds up; kept on the device until read.

    tokens: how many were read, without padding.
    """

    loss: Tensor | float = 0.0
    count: Tensor | int = 0
    more: dict[str, Tensor] = field(default_factory=dict)
    tokens: Tensor | int = 0

    def add(self, other: "LossSums") -> None:
        self.loss = self.loss + other.loss
        self.count = self.count + other.count
        self.tokens = self.tokens + other.tokens
        self.more = {key: self.more.get(key, 0) + value for key, value in other.more.items()}

    def over(self, workers: ProcessGroup, device: torch.device) -> None:
        """Add up those of all processes. Double precision holds every number exactly."""
        if workers.size == 1:
            return
        own = (self.loss, self.count, self.tokens, *self.more.values())
        parts = [torch.as_tensor(part) for part in own]
        sizes = [part.numel() for part in parts]
        flat = torch.cat([part.to(device, torch.float64).flatten() for part in parts])
        workers.all_reduce_([flat])
        totals = [
            total.view(part.shape).to(part.dtype)
            for part, total in zip(parts, flat.split(sizes), strict=True)
        ]
        self.loss, self.count, self.tokens = totals[:3]
        self.more = dict(zip(self.more, totals[3:], strict=True))

    def complete(self, workers: ProcessGroup, device: torch.device) -> None:
        """Add zeros for what the first process has and this one, without a sample, has not."""
        shapes = workers.broadcast_object(
            {name: list(value.shape) for name, value in self.more.items()}
        )
        for name, shape in shapes.items():
            self.more.setdefault(name, torch.zeros(shape, device=device))

    def state(self) -> dict[str, Any]:
        """As JSON; single precision survives the way through Python's doubles exactly."""
        more = {key: value.tolist() for key, value in self.more.items()}
        numbers = {"loss": float(self.loss), "count": int(self.count), "tokens": int(self.tokens)}
        return numbers | {"more": more}

    @classmethod
    def load(cls, state: dict[str, Any], device: torch.device) -> "LossSums":
        more = {key: torch.tensor(value, device=device) for key, value in state["more"].items()}
        loss = torch.tensor(state["loss"], device=device)
        count = torch.tensor(state["count"], device=device)
        return cls(loss, count, more, state["tokens"])

    def metrics(self, objective: Objective) -> dict[str, float]:
        mean = float(self.loss) / max(int(self.count), 1)
        return objective.metrics(mean, {key: value.tolist() for key, value in self.more.items()})
