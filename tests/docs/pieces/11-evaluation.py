"""The piece has the intervals of the package, and exams that behave as the chapter says."""

import re

from minimind.evaluation.statistics import wilson_interval
from tests.support.pieces import PiecePage


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]


def check(page: PiecePage) -> None:
    for right, questions in ((335, 1342), (0, 8), (26, 26), (2901, 11582)):
        page.write("questions", str(questions))
        page.write("right", str(right))
        expected = [right / questions, *wilson_interval(right, questions)]
        assert numbers(page.text("own")) == [round(100 * value, 1) for value in expected]
    page.write("right", "20000")
    assert (
        page.text("own")
        == {"en": "Not a possible result.", "zh": "不可能有这样的结果。"}[page.lang]
    )

    def counts(name: str) -> float:
        [count] = [n for n in numbers(page.text(name)) if n != 52] or [52]
        return count

    def results() -> list[str]:
        return page.run("return [...document.querySelectorAll('circle')].map(e => e.outerHTML)")

    assert page.text("truth").endswith("= 25.0 %")
    before = results()
    assert len(before) == 52
    best, worst = numbers(page.text("best"))
    assert best > 38 and worst < 15  # 26 questions: guessing looks like knowing in some subject
    page.click('[data-id="again"]')
    assert results() != before

    page.write("size", "7")  # 5,000 questions
    page.write("knows", "10")
    assert page.text("truth").endswith("= 32.5 %")
    assert counts("above") == 52
    assert 44 <= counts("covered") <= 52
    best, worst = numbers(page.text("best"))
    assert 30 < worst < 32.5 < best < 35
    page.write("options", "2")
    assert page.text("truth").endswith("= 55.0 %")
    page.write("knows", "100")
    assert numbers(page.text("best")) == [100, 100]
