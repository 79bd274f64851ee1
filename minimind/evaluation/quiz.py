"""The quiz: questions in words that were never trained on, asked of a model, and marked."""

from collections.abc import Sequence
from dataclasses import dataclass

from minimind.data.textbook import QuizQuestion, is_fluent, is_right


@dataclass(frozen=True)
class Marked:
    """A question with the model's answer. right: it matches the keywords; fluent: see is_fluent."""

    question: QuizQuestion
    answer: str
    right: bool
    fluent: bool


def mark(questions: Sequence[QuizQuestion], answers: Sequence[str]) -> list[Marked]:
    """Mark each answer."""
    return [
        Marked(question, answer, is_right(question, answer), is_fluent(answer))
        for question, answer in zip(questions, answers, strict=True)
    ]


def by_subject(marked: Sequence[Marked]) -> dict[str, tuple[int, int]]:
    """(right, asked) for each subject."""
    table: dict[str, tuple[int, int]] = {}
    for one in marked:
        right, asked = table.get(one.question.subject, (0, 0))
        table[one.question.subject] = (right + one.right, asked + 1)
    return table
