"""Power laws of the loss: L(x) = E + A / x^α.

With E = 0 it is the form of Kaplan et al. 2020 (equation 1.1), with E the loss that no more of x
takes away that of Hoffmann et al. 2022 (equation 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

Point = tuple[float, float]
FEWEST = 3  # points for a fit
_FEWEST_WITH_FLOOR = 5  # it has three numbers to find
_LEAST_RANGE = 2.0  # largest x over smallest
_ROUNDS, _FLOORS = 5, 101
_NO_FLOOR = 1e-6  # of the lowest loss


@dataclass(frozen=True)
class PowerLaw:
    """floor + scale * x ** -exponent; `r_squared` is that of the logarithm of the loss."""

    floor: float
    scale: float
    exponent: float
    r_squared: float
    points: int

    def at(self, x: float) -> float:
        return float(self.floor + self.scale * x**-self.exponent)

    def formula(self, symbol: str) -> str:
        """Such as L = 1.69 + 406 / N^0.34."""
        floor = f"{self.floor:.3g} + " if self.floor else ""
        return f"L = {floor}{self.scale:.4g} / {symbol}^{self.exponent:.3g}"


def fit_power_law(points: Sequence[Point]) -> PowerLaw | str:
    """Least squares of the logarithm of the loss, over (x, loss); or why there is no fit.

    From 5 points on a floor is sought too.
    """
    x, loss = numpy.array(points, float).reshape(-1, 2).T
    distinct = len(set(x.tolist()))
    if distinct < FEWEST:
        return f"no fit: {distinct} different values, and {FEWEST} are the fewest"
    if x.max() < _LEAST_RANGE * x.min():
        return f"no fit: the values differ by a factor of {x.max() / x.min():.2g} alone"
    floors = numpy.zeros(1)
    if distinct >= _FEWEST_WITH_FLOOR:
        floors = numpy.linspace(0, loss.min(), _FLOORS, endpoint=False)
    for _ in range(_ROUNDS):  # the same again, ten times finer, around the best
        fits = [_fit(x, loss, floor) for floor in floors]
        best = min(fits, key=lambda fit: fit[0])
        step = floors[1] - floors[0] if len(floors) > 1 else 0.0
        near = numpy.linspace(best[1] - step, best[1] + step, 21)
        floors = near[(near >= 0) & (near < loss.min())] if step else floors
    error, floor, scale, exponent = best
    if floor < _NO_FLOOR * loss.min():
        error, floor, scale, exponent = _fit(x, loss, 0.0)
    if exponent <= 0:
        return "no fit: the loss does not fall"
    spread = float(((numpy.log(loss) - numpy.log(loss).mean()) ** 2).sum())
    return PowerLaw(floor, scale, exponent, 1 - error / spread if spread else 1.0, len(x))


def _fit(
    x: NDArray[numpy.float64], loss: NDArray[numpy.float64], floor: float
) -> tuple[float, float, float, float]:
    """(squared error of log loss, floor, scale, exponent) of the best line through logarithms.

    What is left of log(loss - floor) counts as much as it moves log(loss).
    """
    above = loss - floor
    slope, start = numpy.polyfit(numpy.log(x), numpy.log(above), 1, w=above / loss)
    told = floor + numpy.exp(start) * x**slope
    error = float(((numpy.log(told) - numpy.log(loss)) ** 2).sum())
    return error, float(floor), float(numpy.exp(start)), float(-slope)


def frontier(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """The points of all curves that are lower than any before them: the best for so much of x."""
    lowest: list[Point] = []
    for point in sorted(point for curve in curves for point in curve):
        if point[0] > 0 and (not lowest or point[1] < lowest[-1][1]):
            lowest.append(point)
    return lowest
