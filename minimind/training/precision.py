"""In what numbers the model computes; its weights stay float32."""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch

from minimind.errors import ResourceError
from minimind.model.device import multiplies_bf16

_GROW_AFTER = 2000  # good steps before the loss scale is doubled


@dataclass
class LossScaler:
    """Keeps small fp16 gradients from vanishing (Micikevicius et al. 2018, section 3.2).

    Torch's own scaler unscales optimizer by optimizer; here the loop scales the whole gradient
    once anyway, for the number of losses and for clipping, so that this is one more factor.
    """

    scale: float = 1.0
    enabled: bool = False
    good_steps: int = 0

    def update(self, finite: bool) -> None:
        """Halve the scale after a step that overflowed; double it after many good ones."""
        if not self.enabled:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale = max(1.0, self.scale / 2)
        elif self.good_steps % _GROW_AFTER == 0:
            self.scale *= 2

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return vars(self)

    def load(self, state: dict[str, Any]) -> None:
        """Go on where `state` was."""
        self.scale, self.good_steps = state["scale"], state["good_steps"]


@dataclass
class Precision:
    """`name` is bf16, fp16 or fp32."""

    name: str
    device_type: str
    scaler: LossScaler = field(default_factory=LossScaler)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Matrix products in half precision, everything delicate in float32."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.name == "bf16" else torch.float16
        # No cache: each weight is used once, and with activation checkpointing copies of all of
        # them would be kept until the end of the forward pass.
        return torch.autocast(self.device_type, dtype, cache_enabled=False)


def choose_precision(name: str, device: torch.device) -> Precision:
    """`auto`: bf16 where the hardware has it, fp16 on other CUDA devices, else fp32.

    Raises ResourceError for a precision that the device does not have.
    """
    has_bf16 = multiplies_bf16(device)
    if name == "auto":
        name = "bf16" if has_bf16 else "fp16" if device.type == "cuda" else "fp32"
    if name == "fp16" and device.type != "cuda":
        raise ResourceError(f"fp16 needs a CUDA device, and this is {device}; use bf16 or fp32")
    if name == "bf16" and not has_bf16 and device.type == "cuda":
        raise ResourceError(f"{device} has no bf16; use training.precision=fp16")
    scaler = LossScaler(scale=2.0**16, enabled=True) if name == "fp16" else LossScaler()
    return Precision(name, device.type, scaler)
