"""RMSNorm (Zhang and Sennrich 2019)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.model import fused


class RMSNorm(nn.Module):
    """Divide [..., width] by its root mean square, then multiply by a weight, in float32.

    The result has the dtype of the input; under autocast, the autocast dtype.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        kind, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            if fused.is_enabled(x):
                return fused.rms_norm(x, self.weight, self.eps)
            if kind == "cpu" and torch.is_grad_enabled():
                normed: Tensor = _RMSNormOnCPU.apply(x.float(), self.weight, self.eps, dtype)
                return normed
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(dtype)


# --8<-- [start:rms-norm]
def rms_norm_cpu(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (normalized x [..., width], the factors 1 / RMS [..., 1])."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * scale, scale


# --8<-- [end:rms-norm]


class _RMSNormOnCPU(torch.autograd.Function):
    """RMSNorm in fewer passes over memory than `F.rms_norm`, which is not fused on a CPU.

    Forward and backward of [8192, 512] on 2 cores: 22 ms instead of 41.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        normed, scale = rms_norm_cpu(x, eps)
        ctx.save_for_backward(normed, scale, weight)
        return (normed * weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        normed, scale, weight = ctx.saved_tensors
        grad = grads[0].float()
        weight_grad = (grad * normed).flatten(0, -2).sum(0)  # [..., width] -> [width]
        grad = grad * weight
        projection = (grad * normed).mean(-1, keepdim=True)  # [..., 1]
        return grad.addcmul_(normed, projection, value=-1).mul_(scale), weight_grad, None, None
