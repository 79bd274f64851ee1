"""The textbook's quiz: questions in wordings that were not trained on, scored by keywords."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minimind.data.invalid import InvalidRecords
from minimind.data.textbook import QuizQuestion, is_correct, is_fluent, sample_quiz
from minimind.evaluation.generative import GenerativeQuestion, GenerativeTask
from minimind.evaluation.tasks import evenly_spaced

_NUM_QUESTIONS = 400
_SEED = 1
_MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class ScoredAnswer:
    """A model's answer. correct: it matches the keywords. fluent: see `is_fluent`."""

    question: QuizQuestion
    answer: str
    correct: bool
    fluent: bool


def score_answer(question: QuizQuestion, answer: str) -> ScoredAnswer:
    """Score one answer."""
    return ScoredAnswer(question, answer, is_correct(question, answer), is_fluent(answer))


def score_answers(questions: Sequence[QuizQuestion], answers: Sequence[str]) -> list[ScoredAnswer]:
    """Score the answer to each question."""
    return [score_answer(q, answer) for q, answer in zip(questions, answers, strict=True)]


def by_subject(answers: Sequence[ScoredAnswer]) -> dict[str, tuple[int, int]]:
    """Return (correct answers, questions) per subject."""
    table: dict[str, tuple[int, int]] = {}
    for answer in answers:
        correct, questions = table.get(answer.question.subject, (0, 0))
        table[answer.question.subject] = (correct + answer.correct, questions + 1)
    return table


def quiz_task(limit: int | None) -> GenerativeTask:
    """Return the quiz as a task, with the same questions as in the demo."""
    questions = [
        GenerativeQuestion(q.question, q.question, q.answer, _scoring_function(q), q.subject)
        for q in evenly_spaced(sample_quiz(_NUM_QUESTIONS, seed=_SEED), limit)
    ]
    return GenerativeTask("quiz", questions, _MAX_NEW_TOKENS, InvalidRecords())


def _scoring_function(question: QuizQuestion) -> Callable[[str], dict[str, bool]]:
    def score(answer: str) -> dict[str, bool]:
        scored = score_answer(question, answer)
        return {"right": scored.correct, "fluent": scored.fluent}

    return score
