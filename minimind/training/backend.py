"""Training backends: forward, backward and optimizer step, and how processes share the state.

`TorchBackend` replicates everything; `deepspeed_backend.py` shards it (ZeRO).
"""

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from minimind.config.settings import OptimSettings, Recipe
from minimind.model import Transformer
from minimind.training.batch import TensorBatch
from minimind.training.distributed import ProcessGroup
from minimind.training.objectives import LossOutput, Objective
from minimind.training.optimizers import Optimizers
from minimind.training.precision import Precision


class Backend(Protocol):
    """The interface of the training loop to a backend. All ranks call all methods, in one order."""

    @property
    def replicates(self) -> bool:
        """True if each process has the whole model between steps, so that each can validate."""
        ...

    def begin(self) -> None:
        """Give all processes the weights and optimizer state of rank 0, after it loaded them."""
        ...

    def loss(self, batch: TensorBatch) -> LossOutput:
        """Run the forward pass on a micro-batch."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a loss."""
        ...

    def step(self, scale: float) -> float:
        """All-reduce, scale, clip and apply the gradients; return their norm before clipping.

        A norm that is not finite skips the step: weights and optimizer state stay as they are.
        The gradients are cleared in both cases.
        """
        ...

    def discard(self) -> bool:
        """Clear the gradients of an unfinished step; return False if that is impossible."""
        ...

    def set_lr(self, fraction: float) -> None:
        """Set every learning rate to this fraction of its peak."""
        ...

    def lrs(self) -> dict[str, float]:
        """Return the current learning rates by optimizer."""
        ...

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the optimizer state, by `<kind>/<parameter>`; complete on rank 0."""
        ...

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `state_tensors` returned; on rank 0 only, before `begin`."""
        ...

    def gather_weights(self) -> None:
        """Copy sharded weights into the model of rank 0."""
        ...


class TorchBackend:
    """Replicated data parallelism: every process holds all weights, gradients and moments."""

    replicates = True

    def __init__(
        self,
        model: Transformer,
        compiled: Transformer,
        settings: OptimSettings,
        objective: Objective,
        precision: Precision,
        group: ProcessGroup,
    ) -> None:
        """Create the optimizers. `compiled` is the model itself, or torch.compile's wrapper."""
        self._model, self._compiled, self._objective = model, compiled, objective
        self._precision, self._group = precision, group
        self._grad_clip = settings.grad_clip
        optimizers = Optimizers(model, settings)
        self._optimizers = optimizers
        self.set_lr, self.lrs = optimizers.set_lr, optimizers.lrs
        self.state_tensors = optimizers.state_tensors
        self.load_state_tensors = optimizers.load_state_tensors

    def begin(self) -> None:
        self._group.broadcast_([*self._model.state_dict().values(), *self.state_tensors().values()])

    def loss(self, batch: TensorBatch) -> LossOutput:
        with self._precision.autocast():
            return self._objective.loss(self._compiled, batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    # --8<-- [start:step]
    def step(self, scale: float) -> float:
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        self._group.all_reduce_(gradients)
        # --8<-- [start:clip-and-step]
        norm = float(torch.nn.utils.get_total_norm(gradients)) * scale
        if math.isfinite(norm):
            clip = min(1.0, self._grad_clip / (norm + 1e-6))
            torch._foreach_mul_(gradients, scale * clip)
            self._optimizers.step()
        # --8<-- [end:clip-and-step]
        self._optimizers.zero_grad()
        return norm

    # --8<-- [end:step]

    def discard(self) -> bool:
        self._optimizers.zero_grad()
        return True

    def gather_weights(self) -> None:
        pass  # every process has them


def create_backend(
    model: Transformer,
    compiled: Transformer,
    recipe: Recipe,
    objective: Objective,
    precision: Precision,
    group: ProcessGroup,
) -> Backend:
    """Create the backend that the recipe chooses."""
    if recipe.training.backend == "deepspeed":
        # An optional dependency that is slow to import.
        from minimind.training.deepspeed_backend import DeepSpeedBackend

        return DeepSpeedBackend(model, recipe, objective, precision, group)
    return TorchBackend(model, compiled, recipe.optim, objective, precision, group)
