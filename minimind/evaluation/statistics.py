"""How sure a figure is: 95 % intervals."""

import math
from collections.abc import Sequence

import numpy

_Z = 1.959964  # the normal distribution's 97.5 % point
_RESAMPLES = 1000


def wilson_interval(correct: int, questions: int) -> tuple[float, float]:
    """The share that `correct` of `questions` may stand for (Wilson 1927, equation 4)."""
    if not questions:
        return 0.0, 1.0
    share, weight = correct / questions, _Z**2 / questions
    middle = (share + weight / 2) / (1 + weight)
    spread = math.sqrt(share * (1 - share) * weight + weight**2 / 4) / (1 + weight)
    return max(middle - spread, 0.0), min(middle + spread, 1.0)


def ratio_interval(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, float]:
    """Of sum(parts) / sum(wholes), by drawing the pairs again and again (Efron 1979).

    The draws are the same each time. One pair alone says nothing: its interval is its ratio.
    """
    part, whole = numpy.asarray(parts, float), numpy.asarray(wholes, float)
    generator = numpy.random.default_rng(0)
    ratios = numpy.empty(_RESAMPLES)
    for draw in range(_RESAMPLES):
        rows = generator.integers(len(part), size=len(part))
        ratios[draw] = part[rows].sum() / max(whole[rows].sum(), 1e-300)
    low, high = numpy.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)
