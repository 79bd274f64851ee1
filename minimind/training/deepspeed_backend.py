"""DeepSpeed's ZeRO: what else every process would hold is shared out among them.

Of P parameters in float32 on N processes each keeps, by stage (Rajbhandari et al. 2020, ZeRO):

    1  8 P / N bytes of moments
    2  and 4 P / N of gradients
    3  and 4 P / N of weights, which are gathered layer by layer when they are needed

and everything else whole. Checkpoints and metrics are those of the other engine, so that a run goes
on with another number of processes; for them the first process gathers all weights and moments.
"""

import contextlib
import copy
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.config.settings import Recipe
from minimind.errors import CheckpointError
from minimind.model import Transformer
from minimind.training.backend import Loss
from minimind.training.batch import TensorBatch
from minimind.training.distributed import ProcessGroup
from minimind.training.objectives import Objective
from minimind.training.optimizers import STATE_MISMATCH, build_adamw, initial_adamw_state
from minimind.training.precision import Precision

_KEPT_WHOLE = 100_000  # parameters of fewer numbers are not worth sending around in stage 3
_MOMENTS = ("exp_avg", "exp_avg_sq")


@contextlib.contextmanager
def _without_future_warnings() -> Iterator[None]:
    """Silence torch.distributed's warnings of the deprecated names that DeepSpeed calls."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        yield


class _LossModule(nn.Module):
    """An objective as a module: DeepSpeed gathers weights for modules while they are at work."""

    def __init__(self, model: Transformer, objective: Objective, precision: Precision) -> None:
        super().__init__()
        self.model, self._objective, self._precision = model, objective, precision

    def forward(self, sequences: TensorBatch) -> Loss:
        with self._precision.autocast():
            return self._objective.loss(self.model, sequences)


class DeepSpeedBackend:
    """Takes the steps by DeepSpeed, with AdamW; `minimind.training.backend.Engine` says how."""

    def __init__(
        self,
        model: Transformer,
        recipe: Recipe,
        objective: Objective,
        precision: Precision,
        workers: ProcessGroup,
    ) -> None:
        self._model, self._recipe, self._objective = model, recipe, objective
        self._precision, self._workers = precision, workers
        self._stage = recipe.training.zero_stage
        self.replicates = self._stage < 3
        self._loaded: Mapping[str, Tensor] = {}

    @_without_future_warnings()
    def begin(self) -> None:
        workers, model = self._workers, self._model
        device = next(model.parameters()).device
        workers.broadcast_(list(model.state_dict().values()))
        # What DeepSpeed shares out is no model any more that could validate or be saved.
        trained = copy.deepcopy(model) if self._stage == 3 else model
        self._trained = {n: p for n, p in trained.named_parameters() if p.requires_grad}
        self._engine = _initialise(
            _LossModule(trained, self._objective, self._precision),
            build_adamw(self._trained.values(), self._recipe.optim),
            self._settings(),
            device,
        )
        self._zero = self._engine.optimizer
        self._zero.override_loss_scale(1.0)
        self._prepare_states()
        if workers.broadcast_object(bool(self._loaded)):
            self._spread_states(device)
        if self._stage == 3 and not workers.is_main:
            model.to("meta")

    def discard(self) -> bool:
        return False  # in the middle of a backward pass the processes wait for each other

    def _settings(self) -> dict[str, Any]:
        return {
            "managed_gradient_accumulation": False,  # a step ends where the loop says so
            "train_micro_batch_size_per_gpu": 1,  # and this is of no matter then
            "gradient_clipping": self._recipe.optim.grad_clip,
            "zero_optimization": {
                "stage": self._stage,
                "overlap_comm": False,
                "stage3_param_persistence_threshold": _KEPT_WHOLE,
            },
        }

    def _flat(self) -> list[Tensor]:
        """This process's part of all parameters, in one piece for each group."""
        zero = self._zero
        flat = zero.fp32_partitioned_groups_flat if self._stage == 3 else None
        return list(flat or zero.single_partition_of_fp32_groups)

    def _prepare_states(self) -> None:
        """Moments of zero from the start, so that any number of steps leaves the same tensors."""
        for part in self._flat():
            self._zero.optimizer.state[part] = initial_adamw_state(part)
        if self._stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()  # finds a parameter's own in them

    @_without_future_warnings()
    def loss(self, sequences: TensorBatch) -> Loss:
        loss: Loss = self._engine(sequences)
        return loss

    @_without_future_warnings()
    def backward(self, loss: Tensor) -> None:
        # DeepSpeed takes the mean over processes, and the loop wants the sum.
        self._engine.backward(loss * self._workers.size, scale_wrt_gas=False)

    @_without_future_warnings()
    def step(self, scale: float) -> float:
        self._zero.override_loss_scale(1 / scale)  # what gradients are divided by
        self._engine.step()
        self._zero.override_loss_scale(1.0)
        return (
            float(self._engine.get_global_grad_norm())
            if self._engine.was_step_applied()
            else math.inf
        )

    def set_lr(self, fraction: float) -> None:
        for group in self._zero.param_groups:
            group["lr"] = self._recipe.optim.lr * fraction

    def lrs(self) -> dict[str, float]:
        return {"adamw": float(self._zero.param_groups[0]["lr"])}

    @_without_future_warnings()
    def state_tensors(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        step = self._zero.optimizer.state[self._flat()[0]]["step"]
        tensors = {}
        for name, parameter in self._trained.items():
            tensors[f"step/{name}"] = step
            for moment in _MOMENTS:
                whole = safe_get_full_optimizer_state(parameter, moment)
                if self._workers.is_main:
                    tensors[f"{moment}/{name}"] = whole
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        own = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        shapes = {f"{moment}/{name}": p.shape for name, p in own.items() for moment in _MOMENTS}
        shapes |= {f"step/{name}": torch.Size() for name in own}
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise CheckpointError(STATE_MISMATCH)
        self._loaded = tensors

    def _spread_states(self, device: torch.device) -> None:
        """Give each process its part of what the first one has loaded."""
        from deepspeed.utils import (
            safe_get_local_optimizer_state,
            safe_set_full_optimizer_state,
            safe_set_local_optimizer_state,
        )

        workers, loaded = self._workers, self._loaded
        shapes = {name: p.shape for name, p in self._model.named_parameters()}
        for name, parameter in self._trained.items():
            for moment in _MOMENTS:
                whole = torch.empty(shapes[name], device=device)
                if workers.is_main:
                    whole.copy_(loaded[f"{moment}/{name}"])
                workers.broadcast_([whole])
                if self._stage == 3:
                    size = safe_get_local_optimizer_state(parameter, moment).numel()
                    padded = F.pad(whole.flatten(), (0, size * workers.size - whole.numel()))
                    part = padded[size * workers.rank :][:size]
                    safe_set_local_optimizer_state(parameter, part, moment)
                else:
                    safe_set_full_optimizer_state(parameter, whole, moment)
        first = next(iter(self._trained))
        step = workers.broadcast_object(float(loaded[f"step/{first}"]) if workers.is_main else None)
        for part in self._flat():
            self._zero.optimizer.state[part]["step"].fill_(step)
        self._loaded = {}

    @_without_future_warnings()
    def gather_weights(self) -> None:
        if self._stage < 3:
            return
        from deepspeed.utils import safe_get_full_fp32_param

        own = dict(self._model.named_parameters())
        for name, parameter in self._trained.items():
            whole = safe_get_full_fp32_param(parameter)
            if self._workers.is_main:
                own[name].data.copy_(whole)


def _initialise(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    device: torch.device,
) -> Any:
    """DeepSpeed's engine; it tells what goes wrong and nothing else."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    return engine
