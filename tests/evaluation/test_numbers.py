from fractions import Fraction

import pytest

from minimind.evaluation.numbers import last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("所以答案是 12。", "12"),
        ("She has 5 apples and 3 pears, so 8 in all.", "8"),
        ("It costs $1,234.50.", "1234.5"),
        ("3,4", "4"),
        ("x = -7", "-7"),
        ("10-7", "7"),
        ("１２．５元", "12.5"),
        ("一共 3/4 米", "3/4"),
        ("½", "1/2"),
        (r"the answer is \frac{3}{8}.", "3/8"),
        ("20%", "20"),
        ("1/0 or 2", "2"),
        ("2 or 1/0", "2"),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str) -> None:
    assert last_number(text) == Fraction(number)


def test_a_text_without_a_number_has_none() -> None:
    assert last_number("不知道") is None
    assert last_number("") is None
    assert last_number("1/0") is None
