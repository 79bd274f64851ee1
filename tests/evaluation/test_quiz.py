import pytest

from minimind.data.textbook import QuizQuestion
from minimind.evaluation.quiz import by_subject, score_answers

QUESTIONS = [
    QuizQuestion("你知道泰山在哪里吗？", (("山东",),), "山峰", "泰山在山东。", ("陕西",)),
    QuizQuestion("华山位于什么地方？", (("陕西",),), "山峰", "华山在陕西。", ("山东",)),
    QuizQuestion("你叫什么名字？", (("MiniMind",),), "自我认识", "我叫MiniMind。"),
]
ANSWERS = ["泰山在山东。", "华山在山东。", "我叫MiniMind，我叫MiniMind。"]


def test_each_answer_is_scored_by_its_question() -> None:
    scored = score_answers(QUESTIONS, ANSWERS)
    assert [answer.question for answer in scored] == QUESTIONS
    assert [answer.answer for answer in scored] == ANSWERS
    assert [answer.correct for answer in scored] == [True, False, True]
    assert [answer.fluent for answer in scored] == [True, True, False]


def test_by_subject_counts_right_answers_and_questions() -> None:
    scored = score_answers(QUESTIONS, ANSWERS)
    assert by_subject(scored) == {"山峰": (1, 2), "自我认识": (1, 1)}
    assert by_subject([]) == {}


def test_a_missing_answer_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        score_answers(QUESTIONS, ANSWERS[:2])
