import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from minimind.data.textbook import sample_quiz
from minimind.errors import (
    DataError,
    RejectedRequestError,
    ServiceError,
    TokenizerError,
    UsageError,
)
from minimind.evaluation.catalogue import make_task
from minimind.evaluation.models import LocalModel
from minimind.evaluation.quiz import score_answers
from minimind.evaluation.tasks import Answer, GenerationConfig
from minimind.inference.generate import answer_all
from minimind.inference.load import load_for_inference
from minimind.tokenizer.chat import Message

GSM8K = [
    {"question": "How many?", "answer": "She has 2+3=5.\n#### 5"},
    {"question": "How much?", "answer": "#### 1,234"},
    {"question": "Why?", "answer": "no number"},
]
CMATH = [
    {"grade": 1, "input": "几个？", "golden": "9", "id": "cmath_dev-0", "split": "cmath_dev"},
    {"grade": 2, "input": "几分之几？", "golden": "1/2", "id": "d", "split": "cmath_dev"},
    {"grade": 1, "input": "混淆", "golden": "1", "id": "x", "split": "distractor"},
]


class FakeModel:
    """A model with prepared answers."""

    name = "fake"

    def __init__(self, *answers: str | Exception) -> None:
        self._answers = answers
        self.questions: list[str] = []

    def scorer(self) -> None:
        raise AssertionError

    def answers(
        self, conversations: Sequence[Sequence[Message]], generation: GenerationConfig
    ) -> Iterator[tuple[int, Answer | Exception]]:
        self.questions += [message["content"] for [message] in conversations]
        assert generation.max_new_tokens > 0
        for index, answer in reversed(list(enumerate(self._answers))):
            yield index, Answer(answer) if isinstance(answer, str) else answer


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("file", ["gsm8k.jsonl", "grade_school_math/data/test.jsonl"])
def test_gsm8k_is_scored_by_the_final_number(tmp_path: Path, file: str) -> None:
    write(tmp_path / file, list(GSM8K))
    task = make_task("gsm8k", data=[str(tmp_path)])
    assert len(task) == 2
    assert task.invalid.total == 1
    model = FakeModel("Two and three are 5.0", "It is 1234 or 1235")
    results = list(task.run(model, {}))  # type: ignore[arg-type]
    assert model.questions == ["How many?", "How much?"]
    assert [(r["right"], r["expected"]) for r in results] == [(False, "1,234"), (True, "5")]
    summary = task.summary(results)
    assert (summary["correct"], summary["questions"]) == (1, 2)
    assert "by_subject" not in summary


def test_the_file_of_another_benchmark_is_not_read(tmp_path: Path) -> None:
    write(tmp_path / "a" / "test.jsonl", [{"question": "1 + 2 = ?", "answer": "3"}])
    write(tmp_path / "cmath" / "test.jsonl", list(CMATH))
    with pytest.raises(DataError, match=r"found no gsm8k\.jsonl"):
        make_task("gsm8k", data=[str(tmp_path)])
    write(tmp_path / "grade_school_math" / "test.jsonl", list(GSM8K))
    assert list(make_task("gsm8k", data=[str(tmp_path)]).texts().values()) == [
        "How many?",
        "How much?",
    ]


def test_cmath_by_grade_without_distractors(tmp_path: Path) -> None:
    task = make_task(f"cmath:{write(tmp_path / 'mine.jsonl', list(CMATH))}")
    results = list(task.run(FakeModel("是10减1，等于9个", "0.5"), {}))  # type: ignore[arg-type]
    assert [r["right"] for r in results] == [True, True]
    assert list(task.summary(results)["by_subject"]) == ["grade 1", "grade 2"]
    with pytest.raises(DataError, match=r"found no cmath\.jsonl"):
        make_task("cmath", data=[str(tmp_path)])


def test_a_huge_number_is_a_wrong_answer(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k.jsonl", [GSM8K[0], GSM8K[1]])
    task = make_task("gsm8k", data=[str(tmp_path)])
    results = list(task.run(FakeModel("7" * 5000, "1e999999999"), {}))  # type: ignore[arg-type]
    assert [result["right"] for result in results] == [False, False]


def test_errors_are_results_until_too_many_in_a_row(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k.jsonl", [GSM8K[0] | {"id": str(n)} for n in range(30)])
    task = make_task("gsm8k", data=[str(tmp_path)])
    results = list(task.run(FakeModel("5", ServiceError("gone"), "5"), {}))  # type: ignore[arg-type]
    assert [r.get("error") for r in results] == [None, "gone", None]
    errors = [ServiceError("gone")] * 30
    with pytest.raises(ServiceError, match="gone"):
        list(task.run(FakeModel(*errors), {}))  # type: ignore[arg-type]
    # Those of the items themselves do not stop the others.
    for kind in (UsageError, TokenizerError, RejectedRequestError):
        model = FakeModel("5", *[kind("too long")] * 29)
        results = list(task.run(model, {}))  # type: ignore[arg-type]
        assert [r.get("permanent") for r in results] == [True] * 29 + [None]


def test_the_quiz_has_the_questions_of_the_demo(local: LocalModel, varied_dir: Path) -> None:
    task = make_task("quiz", limit=12)
    model, tokenizer = load_for_inference(varied_dir, "cpu")
    quiz = sample_quiz(400, seed=1)
    chosen = [quiz[index * 400 // 12] for index in range(12)]
    answers = answer_all(model, tokenizer, [q.question for q in chosen], max_new_tokens=64)
    results = {r["id"]: r for r in task.run(local, {})}
    assert {q.question: answer for q, answer in zip(chosen, answers, strict=True)} == {
        name: result["answer"] for name, result in results.items()
    }
    assert sum(a.correct for a in score_answers(chosen, answers)) == sum(
        result["right"] for result in results.values()
    )
    assert sum(a.fluent for a in score_answers(chosen, answers)) == sum(
        result["fluent"] for result in results.values()
    )
    assert task.summary(list(results.values()))["fluent"] == 0  # random weights
    del results[chosen[3].question]
    [last] = task.run(local, results)
    assert last["id"] == chosen[3].question


def test_a_question_that_exceeds_the_context_is_an_error(local: LocalModel, tmp_path: Path) -> None:
    rows = [GSM8K[0] | {"question": "How many? " * times} for times in (1, 400)]
    path = write(tmp_path / "gsm8k.jsonl", rows)
    results = list(make_task(f"gsm8k:{path}").run(local, {}))
    errors = {r["id"]: r.get("error", "") for r in results}
    assert errors["gsm8k-1"] == ""
    assert "context is 512" in errors["gsm8k-2"]
