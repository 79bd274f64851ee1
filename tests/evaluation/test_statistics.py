import numpy
import pytest

from minimind.evaluation.statistics import ratio_interval, wilson_interval


@pytest.mark.parametrize(("correct", "questions"), [(0, 10), (10, 20), (337, 1346), (7, 7)])
def test_wilson_contains_the_proportions_that_the_score_test_accepts(
    correct: int, questions: int
) -> None:
    low, high = wilson_interval(correct, questions)
    proportion = correct / questions
    assert 0 <= low <= proportion <= high <= 1
    for bound in (low, high):  # where the score test is exactly at 5 %
        if 0 < bound < 1:
            error = (bound * (1 - bound) / questions) ** 0.5
            assert abs(proportion - bound) / error == pytest.approx(1.959964, rel=1e-6)


def test_wilson_of_a_published_example_and_of_no_questions() -> None:
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998
    assert wilson_interval(0, 0) == (0, 1)


def test_ratio_interval_resamples_pairs() -> None:
    generator = numpy.random.default_rng(1)
    sizes = generator.integers(50, 500, 400)
    bits = sizes * generator.normal(2, 0.5, 400)
    low, high = ratio_interval(bits.tolist(), sizes.tolist())
    assert low < bits.sum() / sizes.sum() < high
    # The delta method's standard error of a ratio.
    ratio = bits.sum() / sizes.sum()
    error = numpy.std(bits - ratio * sizes) / sizes.mean() / 20
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.12)
    assert ratio_interval(bits.tolist(), sizes.tolist()) == (low, high)
    assert ratio_interval([3.0], [2.0]) == (1.5, 1.5)
