"""Mixed precision: autocast dtype and loss scaling, with float32 master weights."""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch

from minimind.errors import ResourceError
from minimind.model.device import multiplies_bf16

_GROWTH_INTERVAL = 2000  # finite steps in a row before the loss scale is doubled


@dataclass
class LossScaler:
    """Dynamic loss scaling for fp16, against underflow of small gradients.

    Micikevicius et al. 2018, section 3.2. torch.amp.GradScaler unscales the gradients in a pass of
    its own. The training loop multiplies them once anyway, to average and to clip, and the loss
    scale is one more factor.
    """

    scale: float = 1.0
    enabled: bool = False
    good_steps: int = 0  # finite steps in a row

    def update(self, finite: bool) -> None:
        """Halve the scale after an overflow; double it after many finite steps in a row."""
        if not self.enabled:
            return
        # --8<-- [start:loss-scale]
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale = max(1.0, self.scale / 2)
        elif self.good_steps % _GROWTH_INTERVAL == 0:
            self.scale *= 2
        # --8<-- [end:loss-scale]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return vars(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, if both runs scale the loss.

        A run may resume on another kind of device, in another precision.
        """
        if self.enabled and state["enabled"]:
            self.scale, self.good_steps = state["scale"], state["good_steps"]


@dataclass
class Precision:
    """The compute dtype. `name`: bf16, fp16 or fp32."""

    name: str
    device_type: str
    scaler: LossScaler = field(default_factory=LossScaler)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which matrix products use the compute dtype."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.name == "bf16" else torch.float16
        # No cache of cast weights: each weight is used once per pass, and with activation
        # checkpointing the cache would hold copies of all of them until the forward pass ends.
        return torch.autocast(self.device_type, dtype, cache_enabled=False)


def assumed_precision(name: str, device_type: str) -> str:
    """Return the precision of a device that this machine lacks: for `auto`, bf16 on CUDA.

    CUDA GPUs multiply bf16 since 2020.
    """
    if name != "auto":
        return name
    return "bf16" if device_type == "cuda" else "fp32"


def choose_precision(name: str, device: torch.device) -> Precision:
    """Return the precision of that name; `auto` chooses bf16, fp16 or fp32 for the device.

    auto: bf16 if the hardware multiplies it, else fp16 on CUDA devices, else fp32.
    Raises ResourceError if the device does not support the precision.
    """
    has_bf16 = multiplies_bf16(device)
    if name == "auto":
        name = "bf16" if has_bf16 else "fp16" if device.type == "cuda" else "fp32"
    if name == "fp16" and device.type != "cuda":
        raise ResourceError(f"fp16 needs a CUDA device, and this is {device}; use bf16 or fp32")
    if name == "bf16" and not has_bf16 and device.type == "cuda":
        raise ResourceError(f"{device} does not support bf16; use training.precision=fp16")
    scaler = LossScaler(scale=2.0**16, enabled=True) if name == "fp16" else LossScaler()
    return Precision(name, device.type, scaler)
