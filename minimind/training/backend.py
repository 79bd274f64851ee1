"""What takes a training step: losses, gradients, optimizers, and how processes share them."""

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from minimind.config.settings import OptimSettings
from minimind.model import Transformer
from minimind.training.batch import TensorBatch
from minimind.training.distributed import ProcessGroup
from minimind.training.objectives import Objective
from minimind.training.optimizers import Optimizers
from minimind.training.precision import Precision

Loss = tuple[Tensor, Tensor, dict[str, Tensor]]  # as an objective gives it


class Backend(Protocol):
    """The loop knows an engine by these methods alone; all processes call them, in one order."""

    @property
    def replicates(self) -> bool:
        """True if each process has the whole model between steps, so that each can validate."""
        ...

    def begin(self) -> None:
        """Let all processes start with the first one's weights and states, once it has loaded."""
        ...

    def loss(self, sequences: TensorBatch) -> Loss:
        """The objective's loss of some windows."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to those of the step."""
        ...

    def step(self, scale: float) -> float:
        """Use the sum of all processes' gradients times `scale`: the norm of that.

        A norm that is not finite leaves everything as it was, except that the gradients are gone.
        """
        ...

    def discard(self) -> bool:
        """Forget the gradients of a step that was not finished; False where that cannot be."""
        ...

    def set_lr(self, fraction: float) -> None:
        """Set every learning rate to this share of its peak."""
        ...

    def lrs(self) -> dict[str, float]:
        """The learning rates in force, by optimizer."""
        ...

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything the optimizers remember, by `<what>/<parameter>`."""
        ...

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """In the first process, before `begin`: take over what `state_tensors` gave."""
        ...

    def gather_weights(self) -> None:
        """Put the weights into the first process's model, where they are not there already."""
        ...


class TorchBackend:
    """Every process holds everything: weights, gradients and moments."""

    replicates = True

    def __init__(
        self,
        model: Transformer,
        compiled: Transformer,
        settings: OptimSettings,
        objective: Objective,
        precision: Precision,
        workers: ProcessGroup,
    ) -> None:
        """`compiled` is the model itself, or what torch.compile made of it."""
        self._model, self._compiled, self._objective = model, compiled, objective
        self._precision, self._workers = precision, workers
        self._grad_clip = settings.grad_clip
        optimizers = Optimizers(model, settings)
        self._optimizers = optimizers
        self.set_lr, self.lrs = optimizers.set_lr, optimizers.lrs
        self.state_tensors = optimizers.state_tensors
        self.load_state_tensors = optimizers.load_state_tensors

    def begin(self) -> None:
        self._workers.broadcast_(
            [*self._model.state_dict().values(), *self.state_tensors().values()]
        )

    def loss(self, sequences: TensorBatch) -> Loss:
        with self._precision.autocast():
            return self._objective.loss(self._compiled, sequences)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, scale: float) -> float:
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        self._workers.all_reduce_(gradients)
        norm = float(torch.nn.utils.get_total_norm(gradients)) * scale
        if math.isfinite(norm):
            clip = min(1.0, self._grad_clip / (norm + 1e-6))
            torch._foreach_mul_(gradients, scale * clip)
            self._optimizers.step()
        self._optimizers.zero_grad()
        return norm

    def discard(self) -> bool:
        self._optimizers.zero_grad()
        return True

    def gather_weights(self) -> None:
        pass
