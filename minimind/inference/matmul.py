"""Matrix products for inference: packed weights and batch-invariant results.

A kernel library picks a kernel by the number of rows, and kernels differ in the order in which they
sum. The row counts that give the same bits depend on the processor, on the number of threads and on
the shape of the matrix: oneDNN sums in one order from 2 rows on with AVX2 or AVX-512, and up to 32
rows with AMX; MKL from 16 rows on. A trial at load time finds a range of row counts that agree;
batches outside it are padded or computed in blocks.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.errors import UsageError

T = TypeVar("T")
Linear = Callable[[Tensor], Tensor]  # [N, in] -> [N, out]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # see `BatchedModel._attend`

_PACKED_ROWS = 16  # expected row count, for which oneDNN lays out a weight
_INT8_INPUTS = 16  # torch's int8 product crashes with other numbers of inputs than multiples of it
_UNLIMITED = 1 << 30
_TRIAL_ROW_COUNTS = (1, 2, 3, 4, 8, 16, 17, 32, 33, 36, 64, 65, 128)
# Kernels for wider matrices sum in the same order (tests/inference/test_matmul.py), and a trial
# with a complete vocabulary would take long.
_MAX_TRIAL_OUTPUTS = 2048


@dataclass(frozen=True)
class RowRange:
    """Row counts for which a product gives a row the same bits, at any position in the batch."""

    least: int
    most: int

    def __contains__(self, count: int) -> bool:
        return self.least <= count <= self.most


# In order of preference. Padding a single row to four costs next to nothing.
_RANGES = [RowRange(least, most) for most in (_UNLIMITED, 64, 32, 16) for least in (1, 2, 4)]
_RANGES += [RowRange(16, most) for most in (_UNLIMITED, 64, 32, 16)]


class Packer:
    """Packs weights into products that are batch-invariant where the processor allows it.

    threads: CPU threads of the thread that will call the products. On a GPU products are not
    batch-invariant, and weights are not quantized: there int8 raises UsageError.
    """

    def __init__(self, device: torch.device, *, int8: bool, threads: int) -> None:
        if int8 and device.type != "cpu":
            raise UsageError(
                f"8-bit weights (int8) are for the CPU, and the device is {device}; choose the "
                "device cpu, or leave int8 out"
            )
        self._int8 = int8
        self._on_cpu, self._threads = device.type == "cpu", threads
        self.ranges: list[RowRange | None] = []  # of each product so far; None = no range agrees

    def __call__(self, weight: Tensor) -> Linear:
        """Pack a weight [out, in], quantized to 8 bits if `int8` is set."""
        return self._pack(_pack_int8 if self._int8 else _pack_weight, weight)

    def exact(self, weight: Tensor) -> Linear:
        """Pack a weight [out, in] without quantization."""
        return self._pack(_pack_weight, weight)

    def _pack(self, pack: Callable[[Tensor], Linear], weight: Tensor) -> Linear:
        product = pack(weight)
        rows = None
        if self._on_cpu:
            outputs, inputs = weight.shape
            outputs = min(outputs, _MAX_TRIAL_OUTPUTS)
            rows = find_row_range(pack, outputs, inputs, weight.dtype, self._threads)
        self.ranges.append(rows)
        if rows is None or rows == RowRange(1, _UNLIMITED):
            return product
        return _in_blocks(product, rows)

    @property
    def batch_invariant(self) -> bool:
        """True when every product gives a row the same bits in any batch."""
        return None not in self.ranges

    @property
    def min_rows(self) -> int:
        """Row count to which the caller pads smaller batches, once instead of in each product.

        2 without a range: a single row mostly uses another kernel.
        """
        return max((rows.least for rows in self.ranges if rows), default=2)


def _in_blocks(product: Linear, rows: RowRange) -> Linear:
    """Compute a product in blocks of row counts within the range."""

    def forward(x: Tensor) -> Tensor:
        count = len(x)
        if count in rows:
            return product(x)
        if count < rows.least:
            return product(F.pad(x, (0, 0, 0, rows.least - count)))[:count]
        rest = count % rows.most
        blocks = [product(block) for block in x[: count - rest].split(rows.most)]
        if rest:  # a rest that is too short is padded with rows of the block before it
            blocks.append(product(x[-max(rest, rows.least) :])[-rest:])
        return torch.cat(blocks)

    return forward


@cache
def find_row_range(
    pack: Callable[[Tensor], Linear],
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    threads: int,
) -> RowRange | None:
    """Try products of this shape with different row counts; return None when no range agrees.

    All rows are equal and every sum is zero, so that the results are pure rounding errors: a
    different order of summation changes nearly every element.
    """

    def trial() -> RowRange | None:
        weight, row = _cancelling(outputs, inputs, dtype)
        product = pack(weight)

        @cache
        def result(count: int) -> Tensor | None:
            """Return the row's result, [outputs]; None when it differs within the batch."""
            out = product(row.expand(count, -1).contiguous())
            return out[0] if bool((out == out[0]).all()) else None

        def agrees(rows: RowRange) -> bool:
            expected = result(rows.least)
            counts = [count for count in _TRIAL_ROW_COUNTS if count in rows]
            return expected is not None and all(
                (found := result(count)) is not None and torch.equal(found, expected)
                for count in counts
            )

        return next(filter(agrees, _RANGES), None)

    return _with_threads(threads, trial)


def attention_is_batch_invariant(
    attend: Attend, kv_heads: int, groups: int, dim: int, *, slots: int, step: int, threads: int
) -> bool:
    """Try attention of a decoded token in different batches; return True when its bits agree.

    Other sequences add slots, and longer ones add masked positions. groups: query heads per
    key/value head; step: smallest number of positions.
    """

    def trial() -> bool:
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(1, kv_heads * groups, dim, generator=generator)
        keys, values = torch.randn(2, kv_heads, 8 * step, dim, generator=generator)
        mask = torch.zeros(kv_heads, groups, 8 * step)
        mask[..., step - 3 :] = -torch.inf
        expected = attend(query, keys[:, :step], values[:, :step], mask[..., :step])
        for count in sorted({1, 2, 3, slots}):
            for span in (step, 2 * step, 8 * step):
                found = attend(
                    query.repeat(count, 1, 1),
                    keys[:, :span].repeat(count, 1, 1),
                    values[:, :span].repeat(count, 1, 1),
                    mask[..., :span].repeat(count, 1, 1),
                )
                if not torch.equal(found, expected.expand(count, -1)):
                    return False
        return True

    return _with_threads(threads, trial)


def _with_threads(threads: int, trial: Callable[[], T]) -> T:
    """Run a trial in a temporary thread, so that its OpenMP thread pool ends with it."""

    def run() -> T:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            return trial()

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(run).result()


def _cancelling(outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a weight [outputs, inputs] and a row [inputs] whose products sum x and -x."""
    generator = torch.Generator().manual_seed(0)
    half = inputs // 2
    order = torch.randperm(half, generator=generator)
    row = torch.randn(half, generator=generator).to(dtype)
    values = torch.randn(outputs + half, generator=generator).to(dtype)
    left = values.unfold(0, half, 1)[:outputs]
    weight, row = torch.cat((left, left[:, order]), 1), torch.cat((row, -row[order]))
    padding = (0, inputs % 2)
    return F.pad(weight, padding), F.pad(row, padding)


def can_pack(dtype: torch.dtype) -> bool:
    """Return True when oneDNN has a packed weight format, its fastest, for this dtype here."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _pack_weight(weight: Tensor) -> Linear:
    """Pack a weight in oneDNN's format where there is one."""
    if weight.device.type == "cpu" and can_pack(weight.dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_ROWS)
        product = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: product(x, packed, None, "none", [], "")
    return lambda x: F.linear(x, weight)


def _pack_int8(weight: Tensor) -> Linear:
    padding = (0, -weight.shape[1] % _INT8_INPUTS)
    rounded, scale = quantize_int8(F.pad(weight, padding))
    product = torch.ops.aten._weight_int8pack_mm.default
    if padding[1]:
        return lambda x: product(F.pad(x, padding), rounded, scale)
    return lambda x: product(x, rounded, scale)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers from -127 to 127 [out, in] and a scale per output row, [out]."""
    assert weight.dtype != torch.float16, "its smallest scales are too coarse"
    # --8<-- [start:int8]
    smallest = torch.finfo(weight.dtype).tiny
    scale = weight.float().abs().amax(1).div_(127).clamp_(min=smallest).to(weight.dtype)
    rounded = (weight.float() / scale.float()[:, None]).round_().clamp_(-127, 127)
    return rounded.to(torch.int8), scale
    # --8<-- [end:int8]
