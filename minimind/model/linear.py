"""Linear layers, which use compiled code where it applies."""

import torch.nn.functional as F
from torch import Tensor, nn

from minimind.model import fused


class Linear(nn.Linear):
    """A linear layer without bias, [..., in] -> [..., out]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x [..., in] by weight [out, in]: -> [..., out]."""
    if fused.takes_linear(x, weight):
        return fused.linear(x, weight)
    return F.linear(x, weight)
