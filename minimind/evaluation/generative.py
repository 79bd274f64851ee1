"""Questions that are answered in words: the quiz, and sums that are marked by their number."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minimind.data.hub import download_hint
from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_objects
from minimind.data.textbook import is_fluent, is_right, sample_quiz
from minimind.errors import DataError
from minimind.evaluation.number_extraction import is_same_number, last_number
from minimind.evaluation.tasks import (
    Answer,
    GenerationConfig,
    Model,
    Result,
    accuracy,
    results_of,
    spread,
)
from minimind.paths import expand_user

_QUIZ = 400
_QUIZ_SEED = 1


@dataclass(frozen=True)
class GenerativeQuestion:
    """A question that is answered in words.

    check: whether an answer is right; fluency: whether it is fluent, None where it is not measured.
    """

    id: str
    question: str
    expected: str
    check: Callable[[str], bool]
    subject: str = ""
    fluency: Callable[[str], bool] | None = None

    def mark(self, answer: Answer) -> Result:
        """The answer with its scores."""
        return {
            "right": self.check(answer.text),
            **({"fluent": self.fluency(answer.text)} if self.fluency else {}),
            "answer": answer.text,
            "expected": self.expected,
        }


class GenerativeTask:
    """Questions that a model answers greedily in a conversation of their own."""

    unit = "question"

    def __init__(
        self,
        name: str,
        questions: Sequence[GenerativeQuestion],
        max_new_tokens: int,
        bad: InvalidRecords,
    ) -> None:
        self.name, self.bad = name, bad
        self._questions, self._max_new_tokens = questions, max_new_tokens

    def __len__(self) -> int:
        return len(self._questions)

    def settings(self) -> dict[str, Any]:
        """The questions too."""
        whole = json.dumps([(q.id, q.question, q.expected) for q in self._questions])
        return {
            "task": self.name,
            "max_new_tokens": self._max_new_tokens,
            "questions": len(self),
            "sha256": hashlib.sha256(whole.encode()).hexdigest(),
        }

    def texts(self) -> dict[str, str]:
        """The questions."""
        return {question.id: question.question for question in self._questions}

    def run(self, model: Model, done: Collection[str]) -> Iterator[Result]:
        """In the order in which answers end."""
        left = [question for question in self._questions if question.id not in done]
        asked = [question.question for question in left]
        answers = model.answers(asked, GenerationConfig(self._max_new_tokens))
        return results_of(
            (left[place].id, answer if isinstance(answer, Exception) else left[place].mark(answer))
            for place, answer in answers
        )

    def summary(self, results: Sequence[Result]) -> dict[str, Any]:
        """Share of right answers, by subject where there are any."""
        subject_of = {question.id: question.subject for question in self._questions}
        table: dict[str, list[bool]] = {}
        for result in results:
            table.setdefault(subject_of[result["id"]], []).append(result["right"])
        metrics = accuracy(sum(result["right"] for result in results), len(results))
        if any("fluent" in result for result in results):
            metrics["fluent"] = sum(result["fluent"] for result in results)
        if set(table) - {""}:
            metrics["by_subject"] = {
                name: accuracy(sum(marks), len(marks)) for name, marks in sorted(table.items())
            }
        return metrics


def quiz_task(limit: int | None) -> GenerativeTask:
    """The textbook's quiz, by keyword match, with fluency beside it; the demo's questions."""
    chosen = spread(sample_quiz(_QUIZ, seed=_QUIZ_SEED), limit)

    questions = [
        GenerativeQuestion(
            q.question, q.question, q.answer, partial(is_right, q), q.subject, is_fluent
        )
        for q in chosen
    ]
    return GenerativeTask("quiz", questions, 64, InvalidRecords())


_ARITHMETIC = {  # fields of the question and of the answer, split, longest answer in tokens
    "gsm8k": ("question", "answer", ("test",), 320),
    "cmath": ("input", "golden", ("test", "cmath_dev"), 256),
}


def arithmetic_task(name: str, places: Sequence[str], limit: int | None) -> GenerativeTask:
    """Math word problems, scored by the final number of an answer."""
    asked, golden, splits, longest = _ARITHMETIC[name]
    bad = InvalidRecords()
    questions = []
    for _, line, row in read_objects(_arithmetic_files(name, places), invalid=bad):
        if row.get("split", splits[0]) not in splits:
            continue
        question, answer = row.get(asked), str(row.get(golden, "")).rpartition("####")[2].strip()
        if not isinstance(question, str) or last_number(answer) is None:
            bad.add(Path(name), line, f"no {asked}, or no number in {golden}", row)
            continue
        bad.num_valid += 1
        questions.append(
            GenerativeQuestion(
                f"{name}-{line}",
                question,
                answer,
                partial(is_same_number, answer),
                subject=f"grade {row['grade']}" if "grade" in row else "",
            )
        )
    if not questions:
        raise DataError(f"{', '.join(places)}: no question of {name} in it {bad.first}".rstrip())
    return GenerativeTask(name, spread(questions, limit), longest, bad)


def _arithmetic_files(name: str, places: Sequence[str]) -> list[Path]:
    """The file of an exam in figures: <name>.jsonl, or test.jsonl as GSM8K is published."""
    for place in places:
        path = expand_user(place)
        if path.is_file():
            return [path]
        for pattern in (
            f"{name}*.jsonl*",
            f"{name}*.parquet",
            f"**/{name}*/test.jsonl",
            "**/test.jsonl",
        ):
            if found := sorted(path.glob(pattern)):
                return found[:1]
    raise DataError(
        f"{', '.join(places) or '--data'}: holds no {name}.jsonl; put it there, or name it: "
        f"--task {name}:PATH{download_hint(name)}"
    )
