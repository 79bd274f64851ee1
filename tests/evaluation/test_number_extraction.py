"""Number extraction, tested on the labelled answers of number_answers.jsonl."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from minimind.evaluation.number_extraction import is_same_number, last_number

LABELLED = [
    json.loads(line)
    for line in Path(__file__).with_name("number_answers.jsonl").read_text("utf-8").splitlines()
]
FORMATS = sorted({row["format"] for row in LABELLED})


def test_the_corpus_is_large_and_mostly_chinese() -> None:
    chinese = [row for row in LABELLED if row["format"].startswith("zh-")]
    assert len(LABELLED) >= 300
    assert 2 * len(chinese) >= len(LABELLED)
    assert len({row["answer"] for row in LABELLED}) > len(LABELLED) - 4


@pytest.mark.parametrize("kind", FORMATS)
def test_labelled_answers(kind: str) -> None:
    rows = [row for row in LABELLED if row["format"] == kind]
    expected = {row["answer"]: row["number"] and Fraction(row["number"]) for row in rows}
    assert {answer: last_number(answer) for answer in expected} == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("一点五万", "15000"),
        ("一万零三百", "10300"),
        ("答案：负三又四分之一", "-13/4"),
        ("零下十二度", "-12"),
        ("三百分之一", "1/300"),
        ("第三天走了 12 千米", "12"),
        ("-$4.50", "-9/2"),
        ("a = 5, b = 7", "7"),
        ("The answer is one hundred twenty-three.", "123"),
        ("-2 3/4%", "-11/4"),
        ("12㎝", "12"),
        ("1/2,3/4", "3/4"),
        ("3/,", "3"),
        ("1,000/1,250", "4/5"),
        ("2 or 1/0", "2"),
    ],
)
def test_unusual_numbers(text: str, number: str) -> None:
    assert last_number(text) == Fraction(number)


@pytest.mark.parametrize(
    "text",
    [
        *("5" * 5000, "12e999999999", "10^999999999", "2^999", "1/" + "3" * 5000),
        *("九" * 5000, "万" * 5000, r"\boxed{" * 3000 + "}" * 3000, "(" * 100_000, ""),
    ],
)
def test_a_number_too_large_to_compute_is_none(text: str) -> None:
    assert last_number(text) is None
    assert not is_same_number("5", text)
    assert not is_same_number(text, text)


@pytest.mark.parametrize(
    ("expected", "answer", "same"),
    [
        ("20%", "0.2", True),
        ("1/5", "20%", True),
        ("20", "百分之二十", True),
        ("0.5", "一半", True),
        ("20%", "2000%", False),
        ("0.2", "20", False),
        ("3", "不知道", False),
    ],
)
def test_equal_numbers_in_different_notations(expected: str, answer: str, same: bool) -> None:
    assert is_same_number(expected, answer) == same
