import numpy
import pytest

from minimind.evaluation.statistics import ratio_interval, wilson_interval


@pytest.mark.parametrize(("correct", "questions"), [(0, 10), (10, 20), (337, 1346), (7, 7)])
def test_wilson_holds_the_shares_that_the_score_test_does_not_refuse(
    correct: int, questions: int
) -> None:
    low, high = wilson_interval(correct, questions)
    share = correct / questions
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):  # where the normal test of the score is just at 5 %
        if 0 < end < 1:
            error = (end * (1 - end) / questions) ** 0.5
            assert abs(share - end) / error == pytest.approx(1.959964, rel=1e-6)


def test_wilson_of_a_published_example_and_of_nothing() -> None:
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998
    assert wilson_interval(0, 0) == (0, 1)


def test_ratios_are_drawn_by_document() -> None:
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
