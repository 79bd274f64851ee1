"""Power laws of the loss: L(x) = E + A / x^α.

With E = 0 this is the form of Kaplan et al. 2020 (equation 1.1). With an irreducible loss E > 0 it
is the form of Hoffmann et al. 2022 (equation 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

Point = tuple[float, float]
MIN_POINTS = 3
_MIN_POINTS_WITH_FLOOR = 5  # a floor is a third parameter to fit
_MIN_RANGE = 2.0  # largest x divided by smallest x
_ROUNDS, _FLOORS = 5, 101  # rounds and grid points of the search for the floor
_ZERO_FLOOR = 1e-6  # relative to the lowest loss


@dataclass(frozen=True)
class PowerLaw:
    """The law floor + scale * x ** -exponent. r_squared: R² of the logarithm of the loss."""

    floor: float
    scale: float
    exponent: float
    r_squared: float
    points: int

    def at(self, x: float) -> float:
        """Return the loss at x."""
        return float(self.floor + self.scale * x**-self.exponent)

    def formula(self, symbol: str) -> str:
        """Return a formula such as L = 1.69 + 406 / N^0.34."""
        floor = f"{self.floor:.3g} + " if self.floor else ""
        return f"L = {floor}{self.scale:.4g} / {symbol}^{self.exponent:.3g}"


def fit_power_law(points: Sequence[Point]) -> PowerLaw | str:
    """Fit (x, loss) points by least squares of log loss; return the reason if there is no fit.

    With at least 5 points, the floor is fitted too.
    """
    x, loss = numpy.array(points, float).reshape(-1, 2).T
    distinct = len(set(x.tolist()))
    if distinct < MIN_POINTS:
        return f"no fit: {distinct} different values, at least {MIN_POINTS} are needed"
    if x.max() < _MIN_RANGE * x.min():
        return f"no fit: the values differ by a factor of only {x.max() / x.min():.2g}"
    floors = numpy.zeros(1)
    if distinct >= _MIN_POINTS_WITH_FLOOR:
        floors = numpy.linspace(0, loss.min(), _FLOORS, endpoint=False)
    for _ in range(_ROUNDS):  # each round refines the grid tenfold around the best floor
        fits = [_fit(x, loss, floor) for floor in floors]
        best = min(fits, key=lambda fit: fit[0])
        step = floors[1] - floors[0] if len(floors) > 1 else 0.0
        near = numpy.linspace(best[1] - step, best[1] + step, 21)
        floors = near[(near >= 0) & (near < loss.min())] if step else floors
    error, floor, scale, exponent = best
    if floor < _ZERO_FLOOR * loss.min():
        error, floor, scale, exponent = _fit(x, loss, 0.0)
    if exponent <= 0:
        return "no fit: the loss does not fall"
    variance = float(((numpy.log(loss) - numpy.log(loss).mean()) ** 2).sum())
    return PowerLaw(floor, scale, exponent, 1 - error / variance if variance else 1.0, len(x))


def _fit(
    x: NDArray[numpy.float64], loss: NDArray[numpy.float64], floor: float
) -> tuple[float, float, float, float]:
    """Fit a line to log(loss - floor) over log x.

    Residuals are weighted by d log(loss) / d log(loss - floor). Returns (squared error of log loss,
    floor, scale, exponent).
    """
    above = loss - floor
    slope, start = numpy.polyfit(numpy.log(x), numpy.log(above), 1, w=above / loss)
    predicted = floor + numpy.exp(start) * x**slope
    error = float(((numpy.log(predicted) - numpy.log(loss)) ** 2).sum())
    return error, float(floor), float(numpy.exp(start)), float(-slope)


def frontier(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """Return the points of all curves whose loss is lower than at any smaller x."""
    lowest: list[Point] = []
    for point in sorted(point for curve in curves for point in curve):
        if point[0] > 0 and (not lowest or point[1] < lowest[-1][1]):
            lowest.append(point)
    return lowest
