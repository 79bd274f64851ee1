"""What a stage trains for. The loop knows an objective by these methods alone."""

from typing import Any, Protocol

from torch import Tensor

from minimind.model import Transformer
from minimind.training.batch import TensorBatch


class Objective(Protocol):
    """A loss as a sum and a count, so that any split of a batch adds up to the same number."""

    def loss(
        self, model: Transformer, batch: TensorBatch
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(sum of losses, how many there are, further sums by name, of any shape)."""
        ...

    def metrics(self, loss: float, sums: dict[str, Any]) -> dict[str, float]:
        """Figures for people, from the mean loss and the added-up sums (numbers, or lists)."""
        ...

    def note(self, metrics: dict[str, float]) -> str:
        """The figures to show beside a progress bar."""
        ...

    def warning(self, share: float, metrics: dict[str, float]) -> str | None:
        """What is wrong, if figures after a `share` of the run show it; each thing is said once.

        Not called with figures that include the first step.
        """
        ...
