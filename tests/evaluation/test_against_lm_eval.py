"""Our C-Eval and CMMLU against EleutherAI's, question by question.

lm-eval's own task files give its prompts and its model its likelihoods; only where the questions
lie is another place, a file here instead of a hub. Needs the extra `lm-eval`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from small_exams import CHINESE, EXAMPLES, make_ceval, make_varied, write_table

from minimind.evaluation.asking import Asker
from minimind.evaluation.catalogue import make_task
from minimind.evaluation.choice import Choice
from minimind.evaluation.exams import LETTERS, Question
from minimind.evaluation.harness import run_harness
from minimind.evaluation.models import LocalModel
from minimind.evaluation.words import OwnWords
from minimind.model import save_model
from minimind.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.slow,
    # Of lm-eval and what it brings.
    pytest.mark.filterwarnings("ignore"),
]
lm_eval = pytest.importorskip("lm_eval")

FIELDS = {"ceval": ("question", "answer"), "cmmlu": ("Question", "Answer")}
SPLITS = {"ceval": "val", "cmmlu": "test"}
PREFIX = {"ceval": "ceval-valid_", "cmmlu": "cmmlu_"}


@pytest.fixture(scope="module")
def model_dir(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, make_varied(tokenizer, context=2048), tokenizer)
    return folder


def make_exam(name: str, folder: Path) -> Path:
    if name == "ceval":
        return make_ceval(folder / "ceval")
    header = ["", "Question", "A", "B", "C", "D", "Answer"]
    for subject, questions in (("anatomy", CHINESE[:3]), ("logical", CHINESE[3:])):
        write_table(folder / "cmmlu" / "test" / f"{subject}.csv", questions, header)
        write_table(folder / "cmmlu" / "dev" / f"{subject}.csv", EXAMPLES, header)
    return folder / "cmmlu"


def as_records(exam: str, path: Path, questions: list[Question]) -> str:
    """A file of questions as lm-eval's task names their fields."""
    question, answer = FIELDS[exam]
    rows = (
        {question: q.question, answer: q.letter} | dict(zip(LETTERS, q.options, strict=False))
        for q in questions
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def theirs(task: Choice, model_dir: Path, folder: Path, shots: int) -> dict[str, dict[str, Any]]:
    """lm-eval's likelihoods of the letters, and whether it takes the answer for right, by id."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    exam = task.exam.name
    manager = TaskManager()
    by_subject: dict[str, list[Question]] = {}
    for question in task.questions:
        by_subject.setdefault(question.subject, []).append(question)
    tasks = []
    for subject, questions in by_subject.items():
        entry = manager._entry(PREFIX[exam] + subject)
        assert entry is not None and entry.yaml_path is not None
        examples = task.examples[subject]
        files = {
            SPLITS[exam]: as_records(exam, folder / f"{subject}.jsonl", questions),
            "dev": as_records(exam, folder / f"{subject}-dev.jsonl", examples),
        }
        where = {"dataset_path": "json", "dataset_name": None}
        where |= {"dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")}}
        tasks.append(load_yaml(entry.yaml_path) | where)
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model_dir), "dtype": "float32"},
        device="cpu",
        batch_size=4,
        tasks=tasks,
        num_fewshot=shots,
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
    )
    return {
        by_subject[name.removeprefix(PREFIX[exam])][sample["doc_id"]].id: {
            "scores": [float(response[0][0]) for response in sample["resps"]],
            "right": bool(sample["acc"]),
            "prompt": sample["arguments"]["gen_args_0"]["arg_0"]
            if isinstance(sample["arguments"], dict)
            else sample["arguments"][0][0],
        }
        for name, samples in found["samples"].items()
        for sample in samples
    }


@pytest.mark.parametrize("shots", [0, 3])
@pytest.mark.parametrize("exam", ["ceval", "cmmlu"])
def test_each_question_has_the_same_likelihoods(
    exam: str, shots: int, model_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = make_exam(exam, tmp_path)
    task = make_task(exam, data=[str(folder)], style="letter", shots=shots)
    assert isinstance(task, Choice)
    ours = {result["id"]: result for result in task.run(LocalModel(model_dir, "cpu"), ())}
    expected = theirs(task, model_dir, tmp_path, shots)
    assert ours.keys() == expected.keys()
    assert len(ours) == 7
    for name, result in ours.items():
        assert result["scores"] == pytest.approx(expected[name]["scores"], abs=1e-4)
        assert result["right"] == expected[name]["right"]
        assert result["shots"] == shots
    assert len({tuple(result["scores"]) for result in ours.values()}) == 7

    asker = Asker(OwnWords(tokenizer), task.exam, "letter", shots, 2048)
    for question in task.questions:
        row = asker.ask(question, task.examples[question.subject]).rows[0]
        assert tokenizer.decode(row.tokens[: row.start]) == expected[question.id]["prompt"]


def test_its_harness_runs_on_a_model_directory(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a task of its own that needs no network: its registry is asked for by name."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"q": "1+1=", "a": "2"}\n{"q": "2+2=", "a": "4"}\n', encoding="utf-8")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "sums.yaml").write_text(
        "task: tiny_sums\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: ["2", "4"]\n'
        """doc_to_target: "{{['2', '4'].index(a)}}"\n"""
        "metric_list: [{metric: acc}]\n",
        encoding="utf-8",
    )
    from lm_eval import tasks

    manager = tasks.TaskManager(include_path=str(folder))
    monkeypatch.setattr(tasks, "TaskManager", lambda: manager)
    out = tmp_path / "out"
    found = run_harness("tiny_sums", model_dir, out, identity={"model": "1"}, device="cpu")
    assert found["metrics"]["acc"] in (0, 0.5, 1)
    assert (
        json.loads((out / "lm-eval-tiny_sums.json").read_text("utf-8"))["metrics"]
        == (found["metrics"])
    )
    monkeypatch.setattr(lm_eval, "simple_evaluate", None)  # not asked a second time
    again = run_harness("tiny_sums", model_dir, out, identity={"model": "1"}, device="cpu")
    assert again["metrics"] == found["metrics"]
