"""The SwiGLU feed-forward layer (Shazeer 2020)."""

import torch.nn.functional as F
from torch import Tensor, nn

from minimind.config.model import ModelConfig
from minimind.model import fused
from minimind.model.linear import Linear


# --8<-- [start:swiglu]
class FeedForward(nn.Module):
    """SwiGLU: down(SiLU(gate(x)) * up(x)), [..., hidden] -> [..., hidden]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, [..., width] each."""
    if fused.takes(gate):
        return fused.swiglu(gate, up)
    return F.silu(gate) * up


# --8<-- [end:swiglu]
