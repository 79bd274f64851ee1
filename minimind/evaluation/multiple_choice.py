"""Exams of multiple choice as a task."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from minimind.evaluation.benchmark_prompts import Asked, PromptBuilder, Style, choose
from minimind.evaluation.benchmarks import LETTERS, Question, Questions, subject_info
from minimind.evaluation.scoring import Row
from minimind.evaluation.tasks import Model, Result, accuracy, results_of, scored, spread


class MultipleChoice:
    """An exam of multiple choice, asked in one of three styles."""

    unit = "question"

    def __init__(self, questions: Questions, style: Style, shots: int, limit: int | None) -> None:
        self.exam, self._style = questions.exam, style
        self._shots = 0 if style == "chat" else shots
        self.name = f"{self.exam.name} ({style}{f', {self._shots} shots' if self._shots else ''})"
        self.questions, self.examples = spread(questions.asked, limit), questions.examples
        self.bad = questions.bad
        self._sha256 = questions.sha256()

    def __len__(self) -> int:
        return len(self.questions)

    def settings(self) -> dict[str, Any]:
        """The questions too."""
        return {
            "task": self.exam.name,
            "style": self._style,
            "shots": self._shots,
            "questions": len(self),
            "sha256": self._sha256,
        }

    def texts(self) -> dict[str, str]:
        """What is asked about: a passage, else the question without its options.

        Others share options, and the questions about passages: what does the text say?
        """
        return {one.id: one.passage or one.question for one in self.questions}

    def run(self, model: Model, done: Collection[str]) -> Iterator[Result]:
        """One subject after the other, for its questions begin alike."""
        scorer, words = model.scorer()
        asker = PromptBuilder(words, self.exam, self._style, self._shots, scorer.context)
        left = [question for question in self.questions if question.id not in done]
        left.sort(key=lambda question: question.subject)

        def ask(question: Question) -> tuple[Asked, Sequence[Row]]:
            asked = asker.ask(question, self.examples.get(question.subject, ()))
            return asked, asked.rows

        return results_of(
            (one.id, found if isinstance(found, Exception) else _choice_result(one, *found))
            for one, found in scored(scorer, left, ask)
        )

    def summary(self, results: Sequence[Result]) -> dict[str, Any]:
        """Share of right ones by subject and group, with what guessing gives."""
        by_id = {question.id: question for question in self.questions}
        rows = [(by_id[result["id"]], result) for result in results]
        by_subject: dict[str, list[tuple[Question, Result]]] = {}
        by_group: dict[str, list[tuple[Question, Result]]] = {}
        for question, result in rows:
            by_subject.setdefault(question.subject, []).append((question, result))
            group = subject_info(self.exam.name, question.subject).group
            by_group.setdefault(group, []).append((question, result))
        by_place = Counter(result["answer"] for _, result in rows)
        return _share(rows) | {
            "by_group": {name: _share(some) for name, some in sorted(by_group.items())},
            "by_subject": {name: _share(some) for name, some in sorted(by_subject.items())},
            "answers": dict(sorted(by_place.items())),
            "fewest_shots": min((result["shots"] for _, result in rows), default=0),
            "cut": sum(result.get("cut", False) for _, result in rows),
        }

    def tables(self, results: Sequence[Result]) -> dict[str, list[dict[str, Any]]]:
        """A row a question for each subject: its options, the right answer and the model's."""
        by_id = {result["id"]: result for result in results}
        tables: dict[str, list[dict[str, Any]]] = {}
        for question in self.questions:
            result = by_id.get(question.id, {})
            options = dict(zip(LETTERS, question.options, strict=False))
            tables.setdefault(question.subject, []).append(
                {"id": question.id, "question": question.question}
                | {letter: options.get(letter, "") for letter in LETTERS[:4]}
                | options
                | {"answer": question.letter, "model_answer": result.get("answer", "")}
                | {"right": int(result["right"]) if result else ""}
            )
        return tables


def _choice_result(question: Question, asked: Asked, scores: list[float]) -> Result:
    chosen = choose(asked, scores)
    cut = {"cut": True} if asked.cut else {}
    return {
        "right": chosen == question.answer,
        "answer": LETTERS[chosen],
        "expected": question.letter,
        "scores": scores,
        "shots": asked.shots,
    } | cut


def _share(rows: Sequence[tuple[Question, Result]]) -> dict[str, Any]:
    correct = sum(result["right"] for _, result in rows)
    chances = [1 / len(question.options) for question, _ in rows]
    return accuracy(correct, len(rows)) | {"chance": sum(chances) / max(len(chances), 1)}
