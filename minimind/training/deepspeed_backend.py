"""DeepSpeed backend (ZeRO): training state sharded over the processes instead of replicated.

With P float32 parameters on N processes, ZeRO (Rajbhandari et al. 2020) shards, by stage,

    1  the optimizer's moments: 8 P / N bytes per process
    2  and the gradients:       4 P / N
    3  and the weights:         4 P / N, gathered layer by layer when they are needed

and replicates the rest. Checkpoints and metrics are the same as with the other backend, so that a
run can be resumed with another number of processes: rank 0 gathers all weights and moments.
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
from minimind.training.batch import TensorBatch
from minimind.training.distributed import ProcessGroup
from minimind.training.objectives import LossOutput, Objective
from minimind.training.optimizers import STATE_MISMATCH, build_adamw, initial_adamw_state
from minimind.training.precision import Precision

_PERSISTENCE_THRESHOLD = 100_000  # stage 3 replicates parameters of fewer elements
_MOMENTS = ("exp_avg", "exp_avg_sq")


@contextlib.contextmanager
def _without_future_warnings() -> Iterator[None]:
    """Silence torch.distributed's warnings about deprecated functions that DeepSpeed calls."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        yield


class _LossModule(nn.Module):
    """The objective as a module, because DeepSpeed gathers weights in hooks of modules.

    The result is a tuple: DeepSpeed looks for tensors in tuples, not in dataclasses.
    """

    def __init__(self, model: Transformer, objective: Objective, precision: Precision) -> None:
        super().__init__()
        self.model, self._objective, self._precision = model, objective, precision

    def forward(self, batch: TensorBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        with self._precision.autocast():
            output = self._objective.loss(self.model, batch)
        return output.loss_sum, output.count, output.metric_sums


class DeepSpeedBackend:
    """`minimind.training.backend.Backend` implemented with DeepSpeed's ZeRO and AdamW."""

    def __init__(
        self,
        model: Transformer,
        recipe: Recipe,
        objective: Objective,
        precision: Precision,
        group: ProcessGroup,
    ) -> None:
        self._model, self._recipe, self._objective = model, recipe, objective
        self._precision, self._group = precision, group
        self._stage = recipe.training.zero_stage
        self.replicates = self._stage < 3
        self._loaded: Mapping[str, Tensor] = {}

    @_without_future_warnings()
    def begin(self) -> None:
        group, model = self._group, self._model
        device = next(model.parameters()).device
        group.broadcast_(list(model.state_dict().values()))
        # DeepSpeed shards the parameters in place: keep a whole model to validate and save.
        trained = copy.deepcopy(model) if self._stage == 3 else model
        self._trained = {n: p for n, p in trained.named_parameters() if p.requires_grad}
        self._engine = _initialize(
            _LossModule(trained, self._objective, self._precision),
            build_adamw(self._trained.values(), self._recipe.optim),
            self._settings(),
            device,
        )
        self._zero = self._engine.optimizer
        self._zero.override_loss_scale(1.0)
        self._init_states()
        if group.broadcast_object(bool(self._loaded)):
            self._load_sharded(device)
        if self._stage == 3 and not group.is_main:
            model.to("meta")

    def discard(self) -> bool:
        return False  # the other ranks may wait in a collective of the backward pass

    def _settings(self) -> dict[str, Any]:
        return {
            "managed_gradient_accumulation": False,  # the training loop accumulates
            "train_micro_batch_size_per_gpu": 1,  # required, and unused without accumulation
            "gradient_clipping": self._recipe.optim.grad_clip,
            "zero_optimization": {
                "stage": self._stage,
                "overlap_comm": False,
                "stage3_param_persistence_threshold": _PERSISTENCE_THRESHOLD,
            },
        }

    def _flat_shards(self) -> list[Tensor]:
        """Return this rank's shard of all parameters, one flat tensor per parameter group."""
        zero = self._zero
        flat = zero.fp32_partitioned_groups_flat if self._stage == 3 else None
        return list(flat or zero.single_partition_of_fp32_groups)

    def _init_states(self) -> None:
        """Create moments of zero, so that the state has the same tensors before the first step."""
        for shard in self._flat_shards():
            self._zero.optimizer.state[shard] = initial_adamw_state(shard)
        if self._stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()  # maps parameters to their slices

    @_without_future_warnings()
    def loss(self, batch: TensorBatch) -> LossOutput:
        return LossOutput(*self._engine(batch))

    @_without_future_warnings()
    def backward(self, loss: Tensor) -> None:
        # --8<-- [start:backward]
        # DeepSpeed averages gradients over the processes; the training loop expects the sum.
        self._engine.backward(loss * self._group.size, scale_wrt_gas=False)
        # --8<-- [end:backward]

    @_without_future_warnings()
    def step(self, scale: float) -> float:
        self._zero.override_loss_scale(1 / scale)  # gradients are divided by the loss scale
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

        step = self._zero.optimizer.state[self._flat_shards()[0]]["step"]
        tensors = {}
        for name, parameter in self._trained.items():
            tensors[f"step/{name}"] = step
            for moment in _MOMENTS:
                full = safe_get_full_optimizer_state(parameter, moment)
                if self._group.is_main:
                    tensors[f"{moment}/{name}"] = full.cpu()  # all of them exceed a GPU
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        own = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        shapes = {f"{moment}/{name}": p.shape for name, p in own.items() for moment in _MOMENTS}
        shapes |= {f"step/{name}": torch.Size() for name in own}
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise CheckpointError(STATE_MISMATCH)
        self._loaded = tensors

    def _load_sharded(self, device: torch.device) -> None:
        """Broadcast the optimizer state that rank 0 loaded, and keep this rank's shard of it."""
        from deepspeed.utils import (
            safe_get_local_optimizer_state,
            safe_set_full_optimizer_state,
            safe_set_local_optimizer_state,
        )

        group, loaded = self._group, self._loaded
        shapes = {name: p.shape for name, p in self._model.named_parameters()}
        for name, parameter in self._trained.items():
            for moment in _MOMENTS:
                full = torch.empty(shapes[name], device=device)
                if group.is_main:
                    full.copy_(loaded[f"{moment}/{name}"])
                group.broadcast_([full])
                if self._stage == 3:
                    size = safe_get_local_optimizer_state(parameter, moment).numel()
                    padded = F.pad(full.flatten(), (0, size * group.size - full.numel()))
                    shard = padded[size * group.rank :][:size]
                    safe_set_local_optimizer_state(parameter, shard, moment)
                else:
                    safe_set_full_optimizer_state(parameter, full, moment)
        first = next(iter(self._trained))
        step = group.broadcast_object(float(loaded[f"step/{first}"]) if group.is_main else None)
        for flat in self._flat_shards():
            self._zero.optimizer.state[flat]["step"].fill_(step)
        self._loaded = {}

    @_without_future_warnings()
    def gather_weights(self) -> None:
        if self._stage < 3:
            return
        from deepspeed.utils import safe_get_full_fp32_param

        own = dict(self._model.named_parameters())
        for name, parameter in self._trained.items():
            full = safe_get_full_fp32_param(parameter)
            if self._group.is_main:
                own[name].data.copy_(full)


def _initialize(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    device: torch.device,
) -> Any:
    """Create DeepSpeed's engine, with a logger that only shows warnings."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    return engine
