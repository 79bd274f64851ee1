"""Multiple-choice benchmarks as tasks."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from minimind.evaluation.benchmark_prompts import ChoicePrompt, PromptBuilder, Style, choose
from minimind.evaluation.benchmarks import LETTERS, Question, Questions, subject_info
from minimind.evaluation.scoring import Row
from minimind.evaluation.tasks import (
    Model,
    Result,
    accuracy,
    evenly_spaced,
    score_items,
    to_results,
)


class MultipleChoice:
    """A multiple-choice benchmark with one of three prompt styles (see benchmark_prompts).

    label: the benchmark with the path of its data, if that is given.
    """

    unit = "question"

    def __init__(
        self,
        questions: Questions,
        style: Style,
        shots: int,
        limit: int | None,
        label: str | None = None,
    ) -> None:
        self.benchmark, self._style = questions.benchmark, style
        self._shots = 0 if style == "chat" else shots
        prompt = f"({style}{f', {self._shots} shots' if self._shots else ''})"
        self.kind = f"{self.benchmark.name} {prompt}"
        self.name = f"{label or self.benchmark.name} {prompt}"
        self.questions = evenly_spaced(questions.questions, limit)
        self._ids = {question.id for question in self.questions}
        self.examples = questions.examples
        self.invalid = questions.invalid
        self._sha256 = questions.sha256()

    def __len__(self) -> int:
        return len(self.questions)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._ids

    def settings(self) -> dict[str, Any]:
        """Return the settings, with a hash of the questions."""
        return {
            "task": self.benchmark.name,
            "style": self._style,
            "shots": self._shots,
            "questions": len(self),
            "sha256": self._sha256,
        }

    def texts(self) -> dict[str, str]:
        """Return the passage of each question if it has one, else the question without options.

        Options, and questions about a passage ("What does the text say?"), occur in many places.
        """
        return {question.id: question.passage or question.question for question in self.questions}

    def run(self, model: Model, done: Mapping[str, Result]) -> Iterator[Result]:
        """Yield results subject by subject, because prompts of a subject share a prefix."""
        scorer, encoder = model.scorer()
        builder = PromptBuilder(encoder, self.benchmark, self._style, self._shots, scorer.context)
        remaining = [question for question in self.questions if question.id not in done]
        remaining.sort(key=lambda question: question.subject)

        def prepare(question: Question) -> tuple[Sequence[Row], Callable[[list[float]], Result]]:
            prompt = builder.build(question, self.examples.get(question.subject, ()))
            return prompt.rows, partial(_to_result, question, prompt)

        items = ((question.id, question) for question in remaining)
        return to_results(score_items(scorer, items, prepare))

    def summary(self, results: Sequence[Result]) -> dict[str, Any]:
        """Return the accuracy, overall and by subject and group, with that of random guessing."""
        by_id = {question.id: question for question in self.questions}
        rows = [(by_id[result["id"]], result) for result in results]
        by_subject: dict[str, list[tuple[Question, Result]]] = {}
        by_group: dict[str, list[tuple[Question, Result]]] = {}
        for question, result in rows:
            by_subject.setdefault(question.subject, []).append((question, result))
            group = subject_info(self.benchmark.name, question.subject).group
            by_group.setdefault(group, []).append((question, result))
        letters = Counter(result["answer"] for _, result in rows)
        return _accuracy_and_chance(rows) | {
            "by_group": {
                name: _accuracy_and_chance(group) for name, group in sorted(by_group.items())
            },
            "by_subject": {
                name: _accuracy_and_chance(subject) for name, subject in sorted(by_subject.items())
            },
            "answers": dict(sorted(letters.items())),
            "fewest_shots": min((result["shots"] for _, result in rows), default=0),
            "cut": sum(result.get("cut", False) for _, result in rows),
        }

    def tables(self, results: Sequence[Result]) -> dict[str, list[dict[str, Any]]]:
        """Return a table per subject: question, options, the right answer and the model's."""
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


def _to_result(question: Question, prompt: ChoicePrompt, scores: list[float]) -> Result:
    chosen = choose(prompt, scores)
    return {
        "right": chosen == question.answer,
        "answer": LETTERS[chosen],
        "expected": question.letter,
        "scores": scores,
        "shots": prompt.shots,
    } | ({"cut": True} if prompt.truncated else {})


def _accuracy_and_chance(rows: Sequence[tuple[Question, Result]]) -> dict[str, Any]:
    correct = sum(result["right"] for _, result in rows)
    chances = [1 / len(question.options) for question, _ in rows]
    return accuracy(correct, len(rows)) | {"chance": sum(chances) / max(len(chances), 1)}
