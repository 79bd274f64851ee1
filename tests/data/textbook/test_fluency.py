"""Fluency: right answers are fluent; damaging one word makes them not fluent."""

import random
import re

import pytest

from minimind.data.textbook import is_fluent, quiz


@pytest.fixture(scope="module")
def answers() -> list[str]:
    """All right answers."""
    return sorted({question.answer for question in quiz()})


def damaged(answer: str, how: str, rng: random.Random) -> str:
    """Return the answer with one word (in Chinese: character) removed, swapped or added."""
    units = list(re.finditer(r"[A-Za-z]+|[\u4e00-\u9fff]", answer))
    start, end = rng.choice(units).span()
    if how == "missing":
        return re.sub("  +", " ", answer[:start] + answer[end:]).strip()
    if how == "swapped" and end < len(answer) - 1:
        return answer[:start] + answer[end : end + 1] + answer[start:end] + answer[end + 1 :]
    return answer[:end] + rng.choice("的了在是大不") + answer[end:]


def test_right_answers_are_fluent(answers: list[str]) -> None:
    assert len(answers) > 2_000
    assert [answer for answer in answers if not is_fluent(answer)] == []


@pytest.mark.parametrize(
    ("how", "minimum"), [("missing", 0.95), ("swapped", 0.98), ("added", 0.98)]
)
def test_damaged_answers_are_not_fluent(how: str, minimum: float, answers: list[str]) -> None:
    """A few damaged answers are still correct sentences, such as 香港的简称港."""
    rng = random.Random(how)
    detected = [not is_fluent(damaged(answer, how, rng)) for answer in answers]
    assert sum(detected) / len(detected) >= minimum


@pytest.mark.parametrize(
    "answer",
    [
        "因为河流把岩石中的盐分带进了大，所以海水是咸的。",
        "因为河流不把岩石中的盐分带进海里。",
        "泰山位山东省。",
        "The capital of France Paris.",
        "泰山位于山东省",
        "",
    ],
)
def test_sentences_with_an_error_are_not_fluent(answer: str) -> None:
    assert not is_fluent(answer)


@pytest.mark.parametrize(
    "answer", ["4乘3等于12。", "我叫MiniMind。", "泰山位于山东省。9加4等于13。"]
)
def test_several_sentences_and_unseen_numbers_are_fluent(answer: str) -> None:
    assert is_fluent(answer)
