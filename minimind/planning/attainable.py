"""The rate of large matrix products: the ceiling of training on this machine at this moment."""

from statistics import median

import torch

from minimind.planning.plan import timed

# Rows x inner x columns. On a CPU: the feed-forward products of `small` and `base`, and a square.
_CPU_SHAPES = ((8192, 512, 1408), (8192, 1408, 512), (4096, 768, 2048), (2048, 2048, 2048))
_GPU_SHAPES = ((8192, 8192, 8192), (16384, 4096, 4096))
_MIN_REPEATS = 3


def attainable_flops(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Return the floating-point operations per second of torch's fastest matrix product.

    Several shapes are multiplied for about `seconds` in total; the result is the rate of the
    fastest, from its median time. The utilisation of training is its FLOPs per second divided by
    this rate.
    """
    shapes = _CPU_SHAPES if device.type == "cpu" else _GPU_SHAPES
    return max(_rate(shape, device, dtype, seconds / len(shapes)) for shape in shapes)


def _rate(
    shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, seconds: float
) -> float:
    rows, inner, columns = shape
    a = torch.randn(rows, inner, device=device, dtype=dtype)
    b = torch.randn(inner, columns, device=device, dtype=dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)

    def multiply() -> None:
        torch.mm(a, b, out=out)

    timed(multiply, device)  # warmup
    durations: list[float] = []
    while len(durations) < _MIN_REPEATS or sum(durations) < seconds:
        durations.append(timed(multiply, device))
    return 2 * rows * inner * columns / median(durations)
