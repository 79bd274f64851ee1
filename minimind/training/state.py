"""Training state that a checkpoint stores as JSON, and the result of training."""

from dataclasses import dataclass, field
from typing import Any

import torch

from minimind.training.sums import LossSums


@dataclass
class TrainingState:
    """Counters and metrics of a run. "Interval" is the time since the last logged line.

    The data cursor is not stored: it is step * global batch size.
    """

    step: int = 0  # optimizer steps done, skipped ones included
    elapsed_s: float = 0.0  # of training alone, over all resumptions
    tokens: int = 0  # input tokens without padding
    interval: LossSums = field(default_factory=LossSums)  # without skipped steps
    interval_tokens: int = 0
    interval_s: float = 0.0
    interval_data_s: float = 0.0  # spent waiting for batches
    grad_norms: list[float] = field(default_factory=list)  # of the interval, without skipped steps
    consecutive_skips: int = 0
    initial_validation: dict[str, float] = field(default_factory=dict)  # before the first step
    validation: dict[str, float] = field(default_factory=dict)  # the newest validation metrics
    validated_step: int = 0  # the step of `validation`
    best: dict[str, Any] = field(default_factory=dict)  # best validation: step, metric, value

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return vars(self) | {"interval": self.interval.state_dict()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> "TrainingState":
        """Rebuild the state, with its sums on `device`."""
        interval = LossSums.from_state_dict(state["interval"], device)
        return cls(**state | {"interval": interval})

    def start_interval(self) -> None:
        """Reset the interval after a line was logged."""
        self.interval, self.grad_norms = LossSums(), []
        self.interval_tokens, self.interval_s, self.interval_data_s = 0, 0.0, 0.0


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of `Trainer.train`."""

    steps: int
    num_steps: int
    elapsed_s: float  # of training alone, over all resumptions
    tokens: int  # input tokens without padding
    initial_validation: dict[str, float]  # before the first step; empty without one
    validation: dict[str, float]
    best: dict[str, Any]  # best validation: step, metric, value
    finished: bool
