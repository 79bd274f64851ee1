"""Training objectives: next-token prediction and preference optimization.

Reading order: next_token.py, balance.py (mixture of experts), preference.py (DPO).
"""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from minimind.model import Transformer
from minimind.training.batch import TensorBatch


@dataclass(frozen=True)
class LossOutput:
    """Loss of a micro-batch as sums, so that any split of a batch adds up to the same totals.

    loss_sum: scalar, the sum of the losses; the only tensor with a gradient.
    count: scalar int64, the number of losses: label tokens, or preference pairs.
    metric_sums: sums from which the objective computes its metrics, of any shape.
    """

    loss_sum: Tensor
    count: Tensor
    metric_sums: dict[str, Tensor]


class Objective(Protocol):
    """The interface between the training loop and a loss function."""

    count_name: str
    """Key of `LossOutput.count` in metrics.jsonl."""

    def loss(self, model: Transformer, batch: TensorBatch) -> LossOutput:
        """Run the model on a batch and return its loss."""
        ...

    def metrics(self, loss: float, sums: dict[str, Any]) -> dict[str, float]:
        """Compute metrics from the mean loss and the total `metric_sums` (numbers or lists)."""
        ...

    def note(self, metrics: dict[str, float]) -> str:
        """Format the metrics to show next to the progress bar."""
        ...

    def warning(self, progress: float, metrics: dict[str, float]) -> str | None:
        """Return a warning if the metrics show a problem; each problem is reported once.

        progress: fraction of the run that is done. Never called with metrics that include step 1.
        """
        ...
