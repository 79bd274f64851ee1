"""Row ranges with equal bits, on simulated processors and on this one."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.errors import UsageError
from minimind.inference import matmul
from minimind.inference.matmul import (
    Linear,
    Packer,
    RowRange,
    attention_is_batch_invariant,
    can_pack,
    find_row_range,
)

UNLIMITED = matmul._UNLIMITED


def in_another_order(x: Tensor, weight: Tensor) -> Tensor:
    """Return the product, summed in two parts."""
    half = weight.shape[1] // 3
    return F.linear(x[:, :half], weight[:, :half]) + F.linear(x[:, half:], weight[:, half:])


def processor(order: Callable[[int, int], bool]) -> Callable[[Tensor], Linear]:
    """Simulate a processor that sums a row of a batch in another order if `order(rows, row)`."""

    def pack(weight: Tensor) -> Linear:
        def product(x: Tensor) -> Tensor:
            rows = [
                (in_another_order if order(len(x), row) else F.linear)(x[row : row + 1], weight)
                for row in range(len(x))
            ]
            return torch.cat(rows)

        return product

    return pack


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (lambda rows, row: False, RowRange(1, UNLIMITED)),
        (lambda rows, row: rows == 1, RowRange(2, UNLIMITED)),
        (lambda rows, row: rows < 4, RowRange(4, UNLIMITED)),
        (lambda rows, row: rows < 11, RowRange(16, UNLIMITED)),
        (lambda rows, row: rows > 32, RowRange(1, 32)),
        (lambda rows, row: rows == 1 or rows > 64, RowRange(2, 64)),
        (lambda rows, row: rows < 16 or rows > 32, RowRange(16, 32)),
        (
            lambda rows, row: row >= rows // 16 * 16,
            RowRange(16, 16),
        ),  # rows after the last full tile
        (lambda rows, row: row % 2 == 1, None),
    ],
)
def test_a_row_range_is_determined_for_each_kind_of_processor(
    order: Callable[[int, int], bool], expected: RowRange | None
) -> None:
    pack = processor(order)
    assert find_row_range(pack, 24, 40, torch.float32, 1) == expected
    if expected:  # and gives the same bits
        weight, rows = torch.randn(24, 40), torch.randn(200, 40)
        product = matmul._in_blocks(pack(weight), expected)
        reference = product(rows)
        torch.testing.assert_close(reference, F.linear(rows, weight))
        for count in (1, 2, 3, 5, 16, 17, 31, 33, 64, 65, 100, 130):
            assert torch.equal(product(rows[-count:]), reference[-count:]), count


@pytest.mark.parametrize(
    ("rows", "count", "expected"),
    [
        (RowRange(2, 32), 1, [2]),
        (RowRange(2, 32), 32, [32]),
        (RowRange(2, 32), 64, [32, 32]),
        (RowRange(2, 32), 65, [32, 32, 2]),
        (RowRange(1, 32), 40, [32, 8]),
        (RowRange(16, 16), 3, [16]),
        (RowRange(16, 16), 50, [16, 16, 16, 16]),
        (RowRange(4, UNLIMITED), 500, [500]),
    ],
)
def test_batches_are_split_into_the_range(rows: RowRange, count: int, expected: list[int]) -> None:
    blocks, weight = [], torch.randn(5, 8)

    def product(x: Tensor) -> Tensor:
        blocks.append(len(x))
        return F.linear(x, weight)

    x = torch.randn(count, 8)
    torch.testing.assert_close(matmul._in_blocks(product, rows)(x), F.linear(x, weight))
    assert blocks == expected


KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}


@pytest.mark.numeric
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 32), (1408, 256), (256, 704), (512, 1408), (6400, 768)])
def test_products_are_batch_invariant_on_this_processor(
    shape: tuple[int, int], kind: str, threads: int
) -> None:
    """Row counts that the trial leaves out and a matrix wider than the trial's are included."""
    dtype = KINDS[kind]
    packer = Packer(torch.device("cpu"), int8=kind == "int8", threads=threads)
    weight, row = matmul._cancelling(*shape, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        product = packer(weight)
        assert packer.batch_invariant
        with torch.inference_mode():
            reference = product(row.expand(16, -1).contiguous())[0]
            assert float(reference.float().abs().max()) > 0, "no rounding errors to compare"
            counts = [*range(1, 20), 31, 32, 33, 35, 37, 63, 64, 65, 100, 129, 257, 320]
            for count in counts if shape[0] < 6400 else counts[::4]:
                actual = product(row.expand(count, -1).contiguous())
                assert bool((actual == reference).all()), count
    finally:
        torch.set_num_threads(before)


def test_int8_products_take_any_number_of_inputs() -> None:
    for inputs in (4, 36, 48, 100):
        weight, x = torch.randn(8, inputs).bfloat16(), torch.randn(3, inputs).bfloat16()
        actual = Packer(torch.device("cpu"), int8=True, threads=1)(weight)(x)
        torch.testing.assert_close(actual, F.linear(x, weight), atol=0.3, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_weights_are_off_by_half_a_step_at_most(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 256).to(dtype)
    rounded, scale = matmul.quantize_int8(weight)
    errors = (rounded * scale[:, None].float() - weight.float()).abs() / scale[:, None].float()
    assert scale.dtype == dtype and float(errors.max()) <= 0.51
    zeros = matmul.quantize_int8(torch.zeros(2, 4, dtype=dtype))[0]
    assert not zeros.any()


def test_cancelling_rows_of_any_length() -> None:
    for inputs in (1, 2, 7, 40):
        weight, row = matmul._cancelling(9, inputs, torch.bfloat16)
        assert weight.shape == (9, inputs) and row.shape == (inputs,)
        assert not (weight.double() @ row.double()).any()


def test_attention_that_depends_on_the_batch_is_detected() -> None:
    def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        scores = torch.baddbmm(mask, q.reshape(len(keys), -1, 8), keys.transpose(1, 2))
        return torch.bmm(scores.softmax(-1), values).reshape(len(q), -1)

    def by_count(q: Tensor, *others: Tensor) -> Tensor:
        return attend(q, *others) * (1 + 1e-7 * (len(q) > 2))

    def by_span(q: Tensor, keys: Tensor, *others: Tensor) -> Tensor:
        return attend(q, keys, *others) * (1 + 1e-7 * (keys.shape[1] > 64))

    sizes = dict(kv_heads=2, groups=2, dim=8, slots=9, step=64, threads=1)
    assert [
        attention_is_batch_invariant(kind, **sizes) for kind in (attend, by_count, by_span)
    ] == [
        True,
        False,
        False,
    ]


def test_weights_that_onednn_cannot_pack_are_used_as_they_are() -> None:
    assert not can_pack(torch.float64)
    weight, x = torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    assert torch.equal(matmul._pack_weight(weight)(x), F.linear(x, weight))


def test_int8_is_refused_off_the_cpu() -> None:
    with pytest.raises(UsageError, match=r"int8.* the device is meta"):
        Packer(torch.device("meta"), int8=True, threads=1)
