import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from minimind.data.textbook import sample_quiz
from minimind.errors import DataError, ServiceError
from minimind.evaluation.catalogue import make_task
from minimind.evaluation.models import LocalModel
from minimind.evaluation.quiz import mark
from minimind.evaluation.tasks import Answer, GenerationConfig
from minimind.inference.generate import answer_all
from minimind.inference.load import load_for_inference

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


class Scripted:
    """Says what it is told to."""

    name = "scripted"

    def __init__(self, *answers: str | Exception) -> None:
        self._answers = answers
        self.asked: list[str] = []

    def scorer(self) -> None:
        raise AssertionError

    def answers(
        self, questions: Sequence[str], manner: GenerationConfig
    ) -> Iterator[tuple[int, Answer | Exception]]:
        self.asked += questions
        assert manner.max_new_tokens > 0
        for place, said in reversed(list(enumerate(self._answers))):
            yield place, Answer(said) if isinstance(said, str) else said


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("place", ["gsm8k.jsonl", "grade_school_math/data/test.jsonl"])
def test_gsm8k_is_marked_by_its_last_number(tmp_path: Path, place: str) -> None:
    write(tmp_path / place, list(GSM8K))
    task = make_task("gsm8k", data=[str(tmp_path)])
    assert len(task) == 2
    assert task.bad.total == 1
    model = Scripted("Two and three are 5.0", "It is 1234 or 1235")
    results = list(task.run(model, ()))  # type: ignore[arg-type]
    assert model.asked == ["How many?", "How much?"]
    assert [(r["right"], r["expected"]) for r in results] == [(False, "1,234"), (True, "5")]
    summary = task.summary(results)
    assert (summary["correct"], summary["questions"]) == (1, 2)
    assert "by_subject" not in summary


def test_cmath_by_grade_without_its_distractors(tmp_path: Path) -> None:
    task = make_task(f"cmath:{write(tmp_path / 'mine.jsonl', list(CMATH))}")
    results = list(task.run(Scripted("是10减1，等于9个", "0.5"), ()))  # type: ignore[arg-type]
    assert [r["right"] for r in results] == [True, True]
    assert list(task.summary(results)["by_subject"]) == ["grade 1", "grade 2"]
    with pytest.raises(DataError, match=r"holds no cmath\.jsonl"):
        make_task("cmath", data=[str(tmp_path)])


def test_an_endless_number_is_a_wrong_answer_and_no_error(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k.jsonl", [GSM8K[0], GSM8K[1]])
    task = make_task("gsm8k", data=[str(tmp_path)])
    results = list(task.run(Scripted("7" * 5000, "1e999999999"), ()))  # type: ignore[arg-type]
    assert [result["right"] for result in results] == [False, False]


def test_faults_are_results_until_there_are_too_many(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k.jsonl", [GSM8K[0] | {"id": str(n)} for n in range(30)])
    task = make_task("gsm8k", data=[str(tmp_path)])
    results = list(task.run(Scripted("5", ServiceError("gone"), "5"), ()))  # type: ignore[arg-type]
    assert [r.get("error") for r in results] == [None, "gone", None]
    faults = [ServiceError("gone")] * 30
    with pytest.raises(ServiceError, match="gone"):
        list(task.run(Scripted(*faults), ()))  # type: ignore[arg-type]


def test_the_quiz_is_the_demos(local: LocalModel, varied_dir: Path) -> None:
    task = make_task("quiz", limit=12)
    model, tokenizer = load_for_inference(varied_dir, "cpu")
    quiz = sample_quiz(400, seed=1)
    chosen = [quiz[place * 400 // 12] for place in range(12)]
    said = answer_all(model, tokenizer, [q.question for q in chosen], max_new_tokens=64)
    results = {r["id"]: r for r in task.run(local, ())}
    assert {q.question: answer for q, answer in zip(chosen, said, strict=True)} == {
        name: result["answer"] for name, result in results.items()
    }
    assert sum(one.right for one in mark(chosen, said)) == sum(
        result["right"] for result in results.values()
    )
    assert sum(one.fluent for one in mark(chosen, said)) == sum(
        result["fluent"] for result in results.values()
    )
    assert task.summary(list(results.values()))["fluent"] == 0  # random weights
    [last] = task.run(local, set(results) - {chosen[3].question})
    assert last["id"] == chosen[3].question


def test_a_question_that_is_too_long_is_told(local: LocalModel, tmp_path: Path) -> None:
    rows = [GSM8K[0] | {"question": "How many? " * times} for times in (1, 400)]
    path = write(tmp_path / "gsm8k.jsonl", rows)
    results = list(make_task(f"gsm8k:{path}").run(local, ()))
    errors = {r["id"]: r.get("error", "") for r in results}
    assert errors["gsm8k-1"] == ""
    assert "context is 512" in errors["gsm8k-2"]
