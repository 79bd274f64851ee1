"""Variable-length attention: packed sequences on a GPU without a dense attention mask.

A dense mask [B, 1, T, T] rules out FlashAttention kernels (Dao 2023), and the scores between
segments are computed for nothing. `torch.nn.attention.varlen` takes all tokens of a batch as one
list, and the offsets at which segments begin.

Shapes: B sequences of T tokens, S segments in all, H query heads, K key/value heads, D head_dim.
"""

import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)  # those of FlashAttention
HEAD_DIMS = range(8, 257, 8)
_TAKES_GQA = torch.__version__ >= "2.12"
_MAX_ERROR = 0.02  # of values around 1 in bf16, whose rounding error is 2^-9 each


class SegmentBounds(NamedTuple):
    """Borders of the segments of a packed batch.

    offsets: int32, the index of the first token of each segment among the B * T tokens, then B * T.
    B * T is repeated until the length is a power of two plus 1, so that few lengths occur.
    longest: an upper bound on the tokens of a segment. It only sizes the kernel launch, so T does,
    and the data need not be read.
    """

    offsets: Tensor
    longest: int


def segment_offsets(segments: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return `SegmentBounds.offsets` of segment numbers [B, T]; see `Transformer.forward`."""
    is_first = np.ones(segments.shape, bool)
    is_first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = np.flatnonzero(is_first)
    padded = 1 << (len(starts) - 1).bit_length()
    offsets = np.full(padded + 1, segments.size, np.int32)
    offsets[: len(starts)] = starts
    return offsets


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: SegmentBounds, scale: float | None
) -> Tensor:
    """Causal attention within segments: q [B, T, H, D], k and v [B, T, K, D] -> [B, T, H, D].

    scale: factor on the scores; None = 1 / sqrt(D).
    """
    # It imports torch._dynamo, which would double the start-up time of programs on the CPU.
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"enable_gqa": True} if _TAKES_GQA else {}
    if not _TAKES_GQA:
        group_size = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(group_size, dim=2), v.repeat_interleave(group_size, dim=2)
    rows = varlen_attn(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        bounds.offsets,
        bounds.offsets,
        bounds.longest,
        bounds.longest,
        scale=scale,
        window_size=(-1, 0),  # causal
        **options,
    )
    assert isinstance(rows, Tensor)  # a pair only where log-sum-exps are requested
    return rows.view_as(q)


@lru_cache
def supports_varlen(device: torch.device) -> bool:
    """Return True if `varlen_attention` computes what a dense mask does; warn if it does not.

    It is tried on a small batch, forward and backward, because kernels differ between devices and
    versions of torch.
    """
    if device.type != "cuda":
        return False
    try:
        error = max_difference_from_mask(device)
        reason = f"results differ by {error:.3f}"
    except Exception as failure:  # of the kernel, which may not exist for this device
        error, reason = float("inf"), str(failure).split("\n")[0]
    if error <= _MAX_ERROR:
        return True
    warnings.warn(
        "variable-length attention does not work here, so packed sequences use a dense attention "
        f"mask, which is slower: {reason}",
        stacklevel=2,
    )
    return False


@torch.inference_mode(False)
@torch.enable_grad()
def max_difference_from_mask(device: torch.device) -> float:
    """Return the largest difference from attention with a dense mask, of outputs and gradients.

    The reference is computed in float32, on small random inputs. The caller may have disabled
    gradients, such as in validation, or enabled autocast.
    """
    generator = torch.Generator().manual_seed(0)
    segments = np.array([[0] * 5 + [1] * 30 + [2] * 29, [0] * 64], np.int32)  # B = 2, T = 64
    bounds = SegmentBounds(torch.from_numpy(segment_offsets(segments)).to(device), 64)
    numbers = torch.from_numpy(segments).to(device)
    mask = (numbers[:, None, :, None] == numbers[:, None, None, :]).tril()  # [B, 1, T, T]
    results = []
    inputs = [torch.randn(2, 64, heads, 32, generator=generator) for heads in (4, 2, 2, 4)]
    q, k, v, grad = (x.to(device, torch.bfloat16) for x in inputs)
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        with torch.autocast(device.type, enabled=False):
            if dtype == torch.bfloat16:
                out = varlen_attention(leaves[0], leaves[1], leaves[2], bounds, None)
            else:
                query, key, value = (x.transpose(1, 2) for x in leaves)
                key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
                out = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)
        grads = torch.autograd.grad(out, leaves, grad.to(dtype))
        results.append([out.detach(), *grads])
    differences = [
        (x.float() - y).abs().max() / y.abs().max() for x, y in zip(*results, strict=True)
    ]
    return float(torch.stack(differences).max())
