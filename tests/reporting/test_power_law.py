import math

import pytest

from minimind.reporting.power_law import PowerLaw, fit_power_law, frontier


def law(floor: float, scale: float, exponent: float, x: list[float]) -> list[tuple[float, float]]:
    return [(value, floor + scale * value**-exponent) for value in x]


def test_a_law_with_a_floor_is_recovered() -> None:
    """With the constants of Hoffmann et al. 2022, table A.4, approach 3."""
    points = law(1.69, 406.4, 0.34, [10.0**power for power in range(6, 12)])
    fit = fit_power_law(points)
    assert isinstance(fit, PowerLaw)
    assert math.isclose(fit.floor, 1.69, rel_tol=1e-3)
    assert math.isclose(fit.scale, 406.4, rel_tol=1e-2)
    assert math.isclose(fit.exponent, 0.34, rel_tol=1e-3)
    assert fit.r_squared > 0.999999 and fit.points == 6
    assert math.isclose(fit.at(1e8), points[2][1], rel_tol=1e-4)


@pytest.mark.parametrize("count", [3, 4, 8])
def test_a_law_without_a_floor_is_recovered(count: int) -> None:
    """With the constants of Kaplan et al. 2020, section 1.2: (8.8e13 / N) ** 0.076."""
    points = law(0.0, 8.8e13**0.076, 0.076, [1e5 * 3**power for power in range(count)])
    fit = fit_power_law(points)
    assert isinstance(fit, PowerLaw)
    assert fit.floor < 1e-6
    assert math.isclose(fit.exponent, 0.076, rel_tol=1e-3)
    assert math.isclose(fit.scale, 8.8e13**0.076, rel_tol=1e-3)
    assert fit.formula("N").endswith("11.48 / N^0.076")


def test_noise_lowers_r_squared() -> None:
    points = law(0.0, 10.0, 0.1, [1e3, 1e4, 1e5, 1e6])
    noisy = [(x, loss * (1 + 0.1 * (-1) ** n)) for n, (x, loss) in enumerate(points)]
    fit, exact = fit_power_law(noisy), fit_power_law(points)
    assert isinstance(fit, PowerLaw) and isinstance(exact, PowerLaw)
    assert exact.r_squared > 0.999999 > 0.97 > fit.r_squared > 0.5


@pytest.mark.parametrize(
    ("points", "why"),
    [
        ([], "no fit: 0 different values"),
        ([(1e3, 5.0), (1e4, 4.0)], "no fit: 2 different values, at least 3 are needed"),
        ([(1e3, 5.0), (1e3, 4.9), (1e4, 4.0)], "no fit: 2 different values"),
        (
            [(1000, 5.0), (1100, 4.9), (1200, 4.0)],
            "no fit: the values differ by a factor of only 1.2",
        ),
        ([(1e3, 4.0), (1e4, 5.0), (1e5, 6.0)], "no fit: the loss does not fall"),
    ],
)
def test_a_missing_fit_has_a_reason(points: list[tuple[float, float]], why: str) -> None:
    reason = fit_power_law(points)
    assert isinstance(reason, str) and reason.startswith(why)


def test_the_frontier_is_the_lowest_loss_so_far() -> None:
    slow, fast = [(2.0, 9.0), (6.0, 5.0)], [(0.0, 10.0), (1.0, 9.0), (3.0, 6.0), (5.0, 6.0)]
    assert frontier([slow, fast]) == [(1.0, 9.0), (3.0, 6.0), (6.0, 5.0)]
    assert frontier([]) == []
