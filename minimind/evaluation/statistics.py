"""95 % confidence intervals."""

import math
from collections.abc import Sequence

import numpy

_Z = 1.959964  # the normal distribution's 97.5 % quantile
_RESAMPLES = 1000


def wilson_interval(correct: int, questions: int) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion (Wilson 1927, equation 4)."""
    if not questions:
        return 0.0, 1.0
    # --8<-- [start:wilson]
    proportion, weight = correct / questions, _Z**2 / questions
    center = (proportion + weight / 2) / (1 + weight)
    margin = math.sqrt(proportion * (1 - proportion) * weight + weight**2 / 4) / (1 + weight)
    return max(center - margin, 0.0), min(center + margin, 1.0)
    # --8<-- [end:wilson]


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float]
) -> tuple[float, float]:
    """Return the bootstrap interval of sum(numerators) / sum(denominators) (Efron 1979).

    Pairs are resampled with a fixed seed. For a single pair, both bounds are its ratio.
    """
    numerator, denominator = numpy.asarray(numerators, float), numpy.asarray(denominators, float)
    generator = numpy.random.default_rng(0)
    ratios = numpy.empty(_RESAMPLES)
    # --8<-- [start:bootstrap]
    for draw in range(_RESAMPLES):
        rows = generator.integers(len(numerator), size=len(numerator))
        ratios[draw] = numerator[rows].sum() / max(denominator[rows].sum(), 1e-300)
    low, high = numpy.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)
    # --8<-- [end:bootstrap]
