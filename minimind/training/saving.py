"""Contents of a checkpoint: everything that a run needs to resume to the same bits.

    model      all weights that are trained
    optimizer  optimizer state, and the random generator states of all ranks
    state      TrainingState, loss scale, length of metrics.jsonl, micro-batch size, number of
               processes, model configuration, and hashes of the data and the base model

`checkpoint.py` has the file format.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind.errors import CheckpointError
from minimind.model import Transformer
from minimind.training.backend import Backend
from minimind.training.checkpoint import Checkpoint, restore_weights
from minimind.training.state import TrainingState


@dataclass(frozen=True)
class SavedState:
    """`state` of a checkpoint."""

    training: TrainingState
    scaler: dict[str, Any]
    metrics_offset: int  # bytes of metrics.jsonl
    micro_batch_size: int
    num_processes: int
    num_steps: int  # planned steps of the run
    config: dict[str, Any]  # of the model, which is rebuilt from it
    data_sha256: str
    base_sha256: str

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return self.training.state_dict() | {
            "scaler": self.scaler,
            "metrics_offset": self.metrics_offset,
            "micro_batch": self.micro_batch_size,
            "processes": self.num_processes,
            "num_steps": self.num_steps,
            "config": self.config,
            "data_sha256": self.data_sha256,
            "base_sha256": self.base_sha256,
        }

    @classmethod
    def from_json(cls, state: dict[str, Any], device: torch.device) -> "SavedState":
        """Rebuild the state, with its sums on `device`."""
        rest = dict(state)
        return cls(
            scaler=rest.pop("scaler"),
            metrics_offset=rest.pop("metrics_offset"),
            micro_batch_size=rest.pop("micro_batch"),
            num_processes=rest.pop("processes"),
            num_steps=rest.pop("num_steps"),
            config=rest.pop("config"),
            data_sha256=rest.pop("data_sha256"),
            base_sha256=rest.pop("base_sha256"),
            training=TrainingState.from_state_dict(rest, device),
        )


def trained_weights(model: Transformer) -> dict[str, Tensor]:
    """Return the model's tensors without the frozen ones, which belong to the base model."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def check_data(run: Path, saved_sha256: str, data_sha256: str) -> None:
    """Raise CheckpointError if the run began with other data or another tokenizer."""
    if saved_sha256 != data_sha256:
        raise CheckpointError(
            f"{run}: the data or the tokenizer has changed since this run began. "
            "Restore it, choose another --out, or start over with --fresh"
        )


def restore_tensors(
    checkpoint: Checkpoint, num_processes: int, model: Transformer, backend: Backend
) -> dict[str, Tensor]:
    """Load weights and optimizer state; return the random generator states [ranks, bytes].

    Raises CheckpointError if they do not fit the model or the optimizers.
    """
    restore_weights(model, checkpoint)
    rng = checkpoint.optimizer.select(lambda name: name.startswith("rng/"))
    try:
        backend.load_state_tensors(checkpoint.optimizer.select(lambda name: name not in rng))
    except CheckpointError as error:
        raise CheckpointError(
            f"{checkpoint.path}: {error}; choose another --out, or start over with --fresh"
        ) from error
    return {name: states.view(num_processes, -1) for name, states in rng.items()}
