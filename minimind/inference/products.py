"""Matrix products for inference: packed weights, and the same bits for a row in any batch.

A library of kernels chooses one by the number of rows, and kernels differ in the order in which
they sum. Which numbers of rows give the same bits depends on the processor, on the number of
threads and on the shape of the matrix: oneDNN with AVX2 or AVX-512 sums in one order from two rows
on, with AMX up to 32 rows, MKL from 16 rows on. A trial at load time finds a range of row counts
that agree, and batches outside it are padded or computed in blocks.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")
Linear = Callable[[Tensor], Tensor]  # [N, in] -> [N, out]
Look = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # as `BatchedModel._look`

_ROWS = 16  # a guess at the number of rows, for which oneDNN chooses the order of a packed weight
_ANY = 1 << 30
_COUNTS = (1, 2, 3, 4, 8, 16, 17, 32, 33, 36, 64, 65, 128)
# Kernels for wider matrices sum in the same order (tests/inference/test_products.py), and a trial
# with a whole vocabulary would take long.
_WIDEST = 2048


@dataclass(frozen=True)
class RowRange:
    """Row counts for which a product gives a row the same bits, at any place in the batch."""

    least: int
    most: int

    def __contains__(self, count: int) -> bool:
        return self.least <= count <= self.most


# The first one that holds is taken. Padding a single row to four costs next to nothing.
_RANGES = [RowRange(least, most) for most in (_ANY, 64, 32, 16) for least in (1, 2, 4)]
_RANGES += [RowRange(16, most) for most in (_ANY, 64, 32, 16)]


class Packer:
    """Turns weights into products whose rows have the same bits in any batch, where possible.

    threads: of the thread that will use the products. On a GPU no such promise is made.
    """

    def __init__(self, device: torch.device, *, int8: bool, threads: int) -> None:
        self._int8 = int8 and device.type == "cpu"
        self._on_cpu, self._threads = device.type == "cpu", threads
        self.ranges: list[RowRange | None] = []  # of each product so far; None = no range holds

    def __call__(self, weight: Tensor) -> Linear:
        """A product with the weight [out, in], as 8-bit integers where that is wanted."""
        return self._pack(_pack_int8 if self._int8 else _pack_weight, weight)

    def exact(self, weight: Tensor) -> Linear:
        """A product with the weight as it is."""
        return self._pack(_pack_weight, weight)

    def _pack(self, pack: Callable[[Tensor], Linear], weight: Tensor) -> Linear:
        product = pack(weight)
        rows = None
        if self._on_cpu:
            outputs, inputs = weight.shape
            rows = find_row_range(pack, min(outputs, _WIDEST), inputs, weight.dtype, self._threads)
        self.ranges.append(rows)
        return product if rows is None or rows == RowRange(1, _ANY) else _within(product, rows)

    @property
    def batch_invariant(self) -> bool:
        """Whether every product gives a row the same bits in any batch."""
        return None not in self.ranges

    @property
    def least_rows(self) -> int:
        """The caller pads batches of fewer rows: once is cheaper than in each product.

        Without a range it is two: a single row mostly has a kernel of its own.
        """
        return max((rows.least for rows in self.ranges if rows), default=2)


def _within(product: Linear, rows: RowRange) -> Linear:
    """Compute a product in batches whose size is in the range alone."""

    def forward(x: Tensor) -> Tensor:
        count = len(x)
        if count in rows:
            return product(x)
        if count < rows.least:
            return product(F.pad(x, (0, 0, 0, rows.least - count)))[:count]
        rest = count % rows.most
        blocks = [product(block) for block in x[: count - rest].split(rows.most)]
        if rest:  # where it is too short, it repeats rows of the block before it
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
    """Try products of this shape with different row counts; None when no range holds.

    All rows are the same and every sum is zero, so that the results are nothing but rounding
    errors: any difference in the order of summation shows in nearly every element.
    """

    def trial() -> RowRange | None:
        weight, row = _cancelling(outputs, inputs, dtype)
        product = pack(weight)

        @cache
        def bits(count: int) -> Tensor | None:
            found = product(row.expand(count, -1).contiguous())
            return found[0] if bool((found == found[0]).all()) else None

        def agree(rows: RowRange) -> bool:
            wanted = bits(rows.least)
            found = [count for count in _COUNTS if count in rows]
            return wanted is not None and all(_equal(bits(count), wanted) for count in found)

        return next(filter(agree, _RANGES), None)

    return _with_threads(threads, trial)


def attends_alike(
    look: Look, heads: int, groups: int, width: int, *, slots: int, step: int, threads: int
) -> bool:
    """Try attention of one query beside others, and return whether its bits stay the same.

    Others make the batch larger, and the span of positions too, of which a text sees only its own.
    """
    return _with_threads(threads, lambda: _attends_alike(look, heads, groups, width, slots, step))


def _attends_alike(look: Look, heads: int, groups: int, width: int, slots: int, step: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads * groups, width, generator=generator)
    keys, values = torch.randn(2, heads, 8 * step, width, generator=generator)
    bias = torch.zeros(heads, groups, 8 * step)
    bias[..., step - 3 :] = -torch.inf
    alone = look(query, keys[:, :step], values[:, :step], bias[..., :step])
    for count in sorted({1, 2, 3, slots}):
        for span in (step, 2 * step, 8 * step):
            found = look(
                query.repeat(count, 1, 1),
                keys[:, :span].repeat(count, 1, 1),
                values[:, :span].repeat(count, 1, 1),
                bias[..., :span].repeat(count, 1, 1),
            )
            if not torch.equal(found, alone.expand(count, -1)):
                return False
    return True


def _equal(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and torch.equal(one, other)


def _with_threads(threads: int, trial: Callable[[], T]) -> T:
    """Run in a thread of its own: OpenMP's helpers, which belong to a thread, end with it."""

    def run() -> T:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            return trial()

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(run).result()


def _cancelling(outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight [outputs, inputs] and a row [inputs] whose products are sums of x and -x."""
    generator = torch.Generator().manual_seed(0)
    half = inputs // 2
    order = torch.randperm(half, generator=generator)
    row = torch.randn(half, generator=generator).to(dtype)
    values = torch.randn(outputs + half, generator=generator).to(dtype)
    left = values.unfold(0, half, 1)[:outputs]
    weight, row = torch.cat((left, left[:, order]), 1), torch.cat((row, -row[order]))
    odd = (0, inputs % 2)
    return F.pad(weight, odd), F.pad(row, odd)


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN keeps weights in an order of its own on this processor, its fastest."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _pack_weight(weight: Tensor) -> Linear:
    """A matrix as it is; on a CPU in oneDNN's order."""
    if weight.device.type == "cpu" and packs(weight.dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        product = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: product(x, packed, None, "none", [], "")
    return lambda x: F.linear(x, weight)


def _pack_int8(weight: Tensor) -> Linear:
    """A matrix as integers from -127 to 127, with a scale for each output."""
    scale = weight.float().abs().amax(1).div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
    rounded = (weight.float() / scale[:, None]).round_().to(torch.int8)
    scale = scale.to(weight.dtype)
    product = torch.ops.aten._weight_int8pack_mm.default
    return lambda x: product(x, rounded, scale)
