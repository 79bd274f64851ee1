"""Operations for training on a CPU in bf16, with gradients: RMSNorm, SwiGLU, attention, linear.

The kernels are in `kernels.cpp`. The modules call these functions where `is_enabled`, and PyTorch's
operations elsewhere.

Shapes: B sequences of T tokens, H query heads, K key/value heads, G = H / K, D head_dim.
"""

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minimind.model.native import AMX_HEADER, SCALAR_HEADER, compile_library

_HEADERS = (AMX_HEADER, SCALAR_HEADER)
_SOURCES = (Path(__file__).with_name("kernels.cpp"), *_HEADERS)
_ATTENTION_SOURCES = (Path(__file__).with_name("attention.cpp"), *_HEADERS)
# Sums may be reordered, which lets them use vector instructions. Infinities and NaN stay correct.
_FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")
_AMX_BLOCK = 32  # rows and columns that are multiplied together
_NORM_BLOCK = 64  # rows whose weight gradients are summed by one thread
_QUERY_BLOCK = 128  # queries whose scores are computed together
_KEY_MULTIPLE = 64  # of a block's first key: oneDNN compiles a product for each new shape
_SCORES = 1 << 19  # scores in memory at the same time: 1 MiB, which fits into a level 2 cache


def is_enabled(x: Tensor) -> bool:
    """Return True if the fused operations apply: autocast to bf16 on a CPU, kernels compiled."""
    return (
        x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and _may_call_kernels()
    )


def takes(x: Tensor) -> bool:
    """Return True if x is a bf16 tensor on a CPU and the kernels are compiled."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and _may_call_kernels()


def _may_call_kernels() -> bool:
    return not torch.compiler.is_compiling() and unavailable_reason() is None


def unavailable_reason() -> str | None:
    """Return why the kernels cannot be used, or None; compiles them at the first call."""
    library = compile_library(_SOURCES, _FLAGS)
    return library if isinstance(library, str) else None


def _call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Call a kernel. Tensors are passed as pointers, None as a null pointer.

    Tensors are contiguous, except where a kernel takes a stride.
    """
    getattr(compile_library(_SOURCES, _FLAGS), name)(*map(_as_c, arguments))


def _as_c(value: Tensor | int | float | None) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p(None) if value is None else ctypes.c_int64(value)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [..., width] in float32, rounded to bf16."""
    out: Tensor = _RMSNorm.apply(x.float().contiguous(), weight, eps)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        rows = x.numel() // width
        out, scale = torch.empty_like(x, dtype=torch.bfloat16), torch.empty(rows)
        _call("rms_norm", x, weight, out, scale, rows, width, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad, rows, width = grads[0].contiguous(), len(scale), x.shape[-1]
        grad_x, sums = torch.empty_like(x), torch.empty(-(-rows // _NORM_BLOCK), width)
        _call("rms_norm_backward", grad, x, weight, scale, grad_x, sums, rows, width, _NORM_BLOCK)
        return grad_x, sums.sum(0), None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, [..., width] each, in bf16. Both may be halves of one tensor."""
    out: Tensor = _SwiGLU.apply(gate, up)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.is_spent = False
        out = gate.new_empty(gate.shape)
        _call("swiglu", gate, up, out, *_rows(gate, up))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Overwrite gate and up with their gradients: fresh memory would double the time.

        Nothing else reads them, and the training loop goes backward once.
        """
        gate, up = ctx.saved_tensors
        if ctx.is_spent:
            raise RuntimeError("the inputs of SwiGLU were overwritten by an earlier backward pass")
        ctx.is_spent = True
        _call("swiglu_backward", grads[0].contiguous(), gate, up, *_rows(gate, up))
        return gate, up


def _rows(gate: Tensor, up: Tensor) -> tuple[int, int, int]:
    """Return (rows, width, stride between rows), which must be the same for both tensors."""
    flat = gate.view(-1, gate.shape[-1])
    assert gate.stride() == up.stride() and flat.stride(1) == 1
    return *flat.shape, flat.stride(0)


def takes_linear(x: Tensor, weight: Tensor) -> bool:
    """Return True if `linear` takes x and this weight, which autocast would round to bf16."""
    return is_enabled(x) and weight.dtype == torch.float32 and _takes_weight_grad(weight)


def takes_weight_grad(x: Tensor, weight: Tensor) -> bool:
    """Return True if `weight_grad` takes bf16 inputs x of this weight and the gradients."""
    return takes(x) and _takes_weight_grad(weight)


def _takes_weight_grad(weight: Tensor) -> bool:
    """Return True on a processor with AMX, for widths that are multiples of its blocks."""
    return not (weight.shape[0] % _AMX_BLOCK or weight.shape[1] % _AMX_BLOCK) and has_amx()


def has_amx() -> bool:
    """Return True if the kernels are compiled and the processor and its system support AMX."""
    library = compile_library(_SOURCES, _FLAGS)
    return not isinstance(library, str) and bool(library.minimind_has_amx())


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in bf16: [..., in] and [out, in] float32 -> [..., out].

    The weight gradient is float32, and takes less time than PyTorch's in bf16
    (benchmarks/records/cpu-kernels.md).
    """
    out: Tensor = _Linear.apply(x.to(torch.bfloat16), weight)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(torch.bfloat16)
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = grads[0] @ weight if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None
        return grad_x, weight_grad(grads[0].flatten(0, -2), x.flatten(0, -2))


def weight_grad(grad: Tensor, x: Tensor, add_to: Tensor | None = None) -> Tensor:
    """Return grad.T @ x in float32, or add it: [N, out], [N, in] in bf16 -> [out, in].

    See `takes_weight_grad`.
    """
    (rows, outputs), inputs = grad.shape, x.shape[1]
    out = torch.empty(outputs, inputs) if add_to is None else add_to
    is_sum = int(add_to is not None)
    _call("weight_grad", grad.contiguous(), x.contiguous(), out, rows, outputs, inputs, is_sum)
    return out


class Block(NamedTuple):
    """Scores that are computed together: some queries of some sequences, and their keys."""

    sequences: slice
    queries: slice
    keys: slice


class PackedMask(NamedTuple):
    """Causal attention within the segments of packed sequences.

    starts: [B, T] int32, the first position of each token's segment.
    blocks: cover all scores within segments; scores between segments are mostly left out. Not used
        on AMX, and empty there.
    """

    starts: Tensor
    blocks: list[Block]


def packed_mask(starts: Tensor, num_heads: int) -> PackedMask:
    """Return the mask of segments that start at `starts` [B, T]."""
    starts = starts.int().contiguous()
    return PackedMask(starts, [] if has_amx() else list(blocks(starts, num_heads)))


def blocks(starts: Tensor, num_heads: int) -> Iterator[Block]:
    """Yield the blocks of a mask; see `PackedMask`."""
    num_sequences, length = starts.shape
    first_keys = starts[:, ::_QUERY_BLOCK].tolist()  # starts do not decrease along T
    for number, start in enumerate(range(0, length, _QUERY_BLOCK)):
        queries = slice(start, min(start + _QUERY_BLOCK, length))
        size = num_heads * (queries.stop - start) * queries.stop
        step = max(1, _SCORES // size)
        for first in range(0, num_sequences, step):
            sequences = slice(first, min(first + step, num_sequences))
            first_key = min(row[number] for row in first_keys[sequences])
            first_key -= first_key % _KEY_MULTIPLE
            yield Block(sequences, queries, slice(first_key, queries.stop))


def attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, mask: PackedMask, scale: float
) -> Tensor:
    """Rotary embedding and attention: q [B, T, H, D], k, v [B, T, K, D] -> [B, T, H * D] in bf16.

    cos, sin: [B, T, D] or [T, D], float32.
    """
    function = _AttentionOnAMX if has_amx() else _Attention
    out: Tensor = function.apply(*(x.contiguous() for x in (q, k, v, cos, sin)), mask, scale)
    return out


class _AttentionOnAMX(torch.autograd.Function):
    """Attention in one kernel each for the forward and the backward pass: `attention.cpp`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: PackedMask,
        scale: float,
    ) -> Tensor:
        (B, T, H, D), K = q.shape, k.shape[2]
        out, logs = q.new_empty(B, T, H * D), torch.empty(B, K, T, H // K)
        ctx.numbers = B, T, H, K, D, int(cos.ndim == 3), scale
        tensors = q, k, v, cos, sin, mask.starts, out, logs
        _call_attention("attention", *tensors, *ctx.numbers)
        ctx.save_for_backward(*tensors)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        results = [torch.empty_like(x) for x in tensors[:3]]  # of q, k and v
        grad = grads[0].contiguous()
        _call_attention("attention_backward", grad, *tensors, *results, *ctx.numbers)
        return *results, None, None, None, None


def _call_attention(name: str, *arguments: Tensor | int | float) -> None:
    getattr(compile_library(_ATTENTION_SOURCES), name)(*map(_as_c, arguments))


class _Attention(torch.autograd.Function):
    """Attention block by block; the backward pass computes the probabilities again.

    As in FlashAttention (Dao et al. 2022), only the output and two numbers per query are kept, not
    the scores. The G query heads of a key/value head are rows of one matrix product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: PackedMask,
        scale: float,
    ) -> Tensor:
        (B, T, H, D), K = q.shape, k.shape[2]
        G = H // K
        # Heads as rows of products: queries [B, K, T, G, D], keys and values [B, K, T, D].
        rows = q.new_empty(B, K, T, G, D), *q.new_empty(2, B, K, T, D)
        _call("split_heads", q, k, v, cos, sin, *rows, B, T, H, K, D, int(cos.ndim == 3))
        highest, sums = torch.empty(2, B, K, T, G)
        weighted = torch.empty_like(rows[0])  # sums over the values, not yet divided by `sums`
        for block in mask.blocks:
            q_rows, k_rows, v_rows = _block_rows(rows, block)
            scores = q_rows @ k_rows.mT  # [sequences * K, queries * G, keys]
            _softmax("softmax", [scores], [highest, sums], mask, block, scale)
            target = weighted[block.sequences, :, block.queries]
            target.copy_((scores @ v_rows).view(target.shape))
        out = q.new_empty(B, T, H * D)
        _call("merge_heads", weighted, sums, out, B, T, H, K, D)
        ctx.save_for_backward(*rows, out, highest, sums, cos, sin)
        ctx.mask, ctx.scale = mask, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *rows, out, highest, sums, cos, sin = ctx.saved_tensors
        B, K, T, G, D = rows[0].shape
        H = K * G
        grad_out, delta = torch.empty_like(rows[0]), torch.empty_like(sums)
        _call("merge_heads_backward", grads[0].contiguous(), out, grad_out, delta, B, T, H, K, D)
        grad_q = torch.empty_like(rows[0])
        grad_k, grad_v = torch.zeros(2, B, K, T, D)  # float32: several blocks add to a key's
        for block in ctx.mask.blocks:
            q_rows, k_rows, v_rows = _block_rows(rows, block)
            grad_rows = _block_rows((grad_out, *rows[1:]), block)[0]
            scores, grad_scores = q_rows @ k_rows.mT, grad_rows @ v_rows.mT
            numbers = [highest, sums, delta]
            _softmax("softmax_backward", [scores, grad_scores], numbers, ctx.mask, block, ctx.scale)
            # Now `scores` are the probabilities, `grad_scores` the gradient of the scores.
            sequences, queries, keys = block
            target = grad_q[sequences, :, queries]
            target.copy_((grad_scores @ k_rows).view(target.shape))
            for target, gradient in (
                (grad_k[sequences, :, keys], grad_scores.mT @ q_rows),
                (grad_v[sequences, :, keys], scores.mT @ grad_rows),
            ):
                target.add_(gradient.view(target.shape))
        grad = rows[0].new_empty(B, T, H, D), *rows[0].new_empty(2, B, T, K, D)
        _call(
            "split_heads_backward", grad_q, grad_k, grad_v, cos, sin, *grad,
            B, T, H, K, D, int(cos.ndim == 3),
        )  # fmt: skip
        return *grad, None, None, None, None


def _block_rows(rows: Sequence[Tensor], block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """Return a block's queries [N, queries * G, D], keys and values [N, keys, D].

    N = sequences * K. rows: those of all blocks, as in `_Attention.forward`.
    """
    q, k, v = rows
    sequences, queries, keys = block
    return (
        q[sequences, :, queries].flatten(2, 3).flatten(0, 1),
        k[sequences, :, keys].flatten(0, 1),
        v[sequences, :, keys].flatten(0, 1),
    )


def _softmax(
    name: str,
    scores: list[Tensor],
    numbers: list[Tensor],
    mask: PackedMask,
    block: Block,
    scale: float,
) -> None:
    """Call the kernel `softmax` or `softmax_backward`. numbers: [B, K, T, G] each."""
    sequences, queries, keys = block
    _call(
        name,
        *scores,
        mask.starts[sequences],
        *(x[sequences] for x in numbers),
        sequences.stop - sequences.start,
        *numbers[0].shape[1:],  # K, T, G
        queries.stop - queries.start,
        keys.stop - keys.start,
        queries.start,
        keys.start,
        scale,
    )


def cross_entropy_(logits: Tensor, labels: Tensor, factors: Tensor | None) -> Tensor:
    """Return the losses [C] in nats; overwrite the bf16 logits [C, V] with their gradient.

    labels: [C] int64. factors: [C] float32, the upstream gradient of each loss; None = 1.
    """
    losses = torch.empty(len(labels))
    factors = None if factors is None else factors.float().contiguous()
    _call("cross_entropy", logits, labels.contiguous(), losses, factors, *logits.shape)
    return losses
