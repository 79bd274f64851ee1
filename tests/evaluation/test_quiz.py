import pytest

from minimind.data.textbook import QuizQuestion
from minimind.evaluation.quiz import by_subject, mark

QUESTIONS = [
    QuizQuestion("你知道泰山在哪里吗？", (("山东",),), "山峰", "泰山在山东。", ("陕西",)),
    QuizQuestion("华山位于什么地方？", (("陕西",),), "山峰", "华山在陕西。", ("山东",)),
    QuizQuestion("你叫什么名字？", (("MiniMind",),), "自我认识", "我叫MiniMind。"),
]
ANSWERS = ["泰山在山东。", "华山在山东。", "我叫MiniMind，我叫MiniMind。"]


def test_each_answer_is_marked_by_its_own_question() -> None:
    marked = mark(QUESTIONS, ANSWERS)
    assert [one.question for one in marked] == QUESTIONS
    assert [one.answer for one in marked] == ANSWERS
    assert [one.right for one in marked] == [True, False, True]
    assert [one.fluent for one in marked] == [True, True, False]


def test_by_subject_counts_right_and_asked() -> None:
    marked = mark(QUESTIONS, ANSWERS)
    assert by_subject(marked) == {"山峰": (1, 2), "自我认识": (1, 1)}
    assert by_subject([]) == {}


def test_an_answer_too_few_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="shorter"):
        mark(QUESTIONS, ANSWERS[:2])
