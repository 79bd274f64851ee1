"""Benchmarks that are scored by generated answers."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minimind.data.invalid import InvalidRecords
from minimind.evaluation.tasks import (
    GenerationConfig,
    Model,
    Result,
    accuracy,
    to_results,
)


@dataclass(frozen=True)
class GenerativeQuestion:
    """A question, its reference answer, and the function that scores a generated answer.

    score: returns `right`, and also `fluent` if fluency is measured.
    """

    id: str
    question: str
    expected: str
    score: Callable[[str], dict[str, bool]]
    subject: str = ""


class GenerativeTask:
    """Questions that are answered with greedy decoding, each in a separate conversation.

    name, kind: see Task.
    """

    unit = "question"

    def __init__(
        self,
        name: str,
        questions: Sequence[GenerativeQuestion],
        max_new_tokens: int,
        invalid: InvalidRecords,
        kind: str | None = None,
    ) -> None:
        self.name, self.kind, self.invalid = name, kind or name, invalid
        self._questions, self._max_new_tokens = questions, max_new_tokens
        self._ids = {question.id for question in questions}

    def __len__(self) -> int:
        return len(self._questions)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._ids

    def settings(self) -> dict[str, Any]:
        """Return the settings, with a hash of the questions."""
        questions = json.dumps([(q.id, q.question, q.expected) for q in self._questions])
        return {
            "task": self.kind,
            "max_new_tokens": self._max_new_tokens,
            "questions": len(self),
            "sha256": hashlib.sha256(questions.encode()).hexdigest(),
        }

    def texts(self) -> dict[str, str]:
        """Return the questions by id."""
        return {question.id: question.question for question in self._questions}

    def run(self, model: Model, done: Mapping[str, Result]) -> Iterator[Result]:
        """Yield results in order of completion."""
        remaining = [question for question in self._questions if question.id not in done]
        answers = model.answers(
            [[{"role": "user", "content": question.question}] for question in remaining],
            GenerationConfig(self._max_new_tokens),
        )

        def outcomes() -> Iterator[tuple[str, Result | Exception]]:
            for index, answer in answers:
                question = remaining[index]
                if isinstance(answer, Exception):
                    yield question.id, answer
                else:
                    result = {"answer": answer.text, "expected": question.expected}
                    yield question.id, question.score(answer.text) | result

        return to_results(outcomes())

    def summary(self, results: Sequence[Result]) -> dict[str, Any]:
        """Return the accuracy, also by subject if the questions have subjects."""
        subject_of = {question.id: question.subject for question in self._questions}
        by_subject: dict[str, list[bool]] = {}
        for result in results:
            by_subject.setdefault(subject_of[result["id"]], []).append(result["right"])
        metrics = accuracy(sum(result["right"] for result in results), len(results))
        if any("fluent" in result for result in results):
            metrics["fluent"] = sum(result["fluent"] for result in results)
        if set(by_subject) - {""}:
            metrics["by_subject"] = {
                name: accuracy(sum(right), len(right)) for name, right in sorted(by_subject.items())
            }
        return metrics
