"""C-Eval and CMMLU compared with lm-eval, question by question.

Prompts are from lm-eval's task files and likelihoods from its model class; only the questions are
read from a local file instead of a hub. Needs the extra `lm-eval`.
"""

import json
from pathlib import Path

import pytest

from minimind.evaluation.benchmark_prompts import PromptBuilder
from minimind.evaluation.catalogue import make_task
from minimind.evaluation.encoding import MinimindEncoder
from minimind.evaluation.harness import run_harness
from minimind.evaluation.models import LocalModel
from minimind.evaluation.multiple_choice import MultipleChoice
from minimind.model import save_model
from minimind.tokenizer import Tokenizer
from tests.support.small_benchmarks import CHINESE, EXAMPLES, make_ceval, make_varied, write_table

lm_eval = pytest.importorskip("lm_eval")
from benchmarks.against_lm_eval import by_lm_eval  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    # From lm-eval and its dependencies.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def model_dir(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, make_varied(tokenizer, context=2048), tokenizer)
    return folder


def make_benchmark(name: str, folder: Path) -> Path:
    if name == "ceval":
        return make_ceval(folder / "ceval")
    header = ["", "Question", "A", "B", "C", "D", "Answer"]
    for subject, questions in (("anatomy", CHINESE[:3]), ("logical", CHINESE[3:])):
        write_table(folder / "cmmlu" / "test" / f"{subject}.csv", questions, header)
        write_table(folder / "cmmlu" / "dev" / f"{subject}.csv", EXAMPLES, header)
    return folder / "cmmlu"


@pytest.mark.parametrize("shots", [0, 3])
@pytest.mark.parametrize("name", ["ceval", "cmmlu"])
def test_each_question_has_the_same_likelihoods(
    name: str, shots: int, model_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = make_benchmark(name, tmp_path)
    task = make_task(name, data=[str(folder)], style="letter", shots=shots)
    assert isinstance(task, MultipleChoice)
    ours = {result["id"]: result for result in task.run(LocalModel(model_dir, "cpu"), {})}
    expected = by_lm_eval(task, model_dir, shots, tmp_path)
    assert ours.keys() == expected.keys()
    assert len(ours) == 7
    for key, result in ours.items():
        assert result["scores"] == pytest.approx(expected[key].scores, abs=1e-4)
        assert result["right"] == expected[key].right
        assert result["shots"] == shots
    assert len({tuple(result["scores"]) for result in ours.values()}) == 7

    builder = PromptBuilder(MinimindEncoder(tokenizer), task.benchmark, "letter", shots, 2048)
    for question in task.questions:
        row = builder.build(question, task.examples[question.subject]).rows[0]
        assert tokenizer.decode(row.tokens[: row.start]) == expected[question.id].prompt


def test_the_harness_runs_on_a_model_directory(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a task that needs no network, added to lm-eval's registry."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"q": "1+1=", "a": "2"}\n{"q": "2+2=", "a": "4"}\n', encoding="utf-8")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "sums.yaml").write_text(
        "task: tiny_addition\ndataset_path: json\n"
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
    out, one = tmp_path / "out", {"model": "1"}
    result = run_harness("tiny_addition", "tiny", model_dir, out, identity=one, device="cpu")
    assert result["metrics"]["acc"] in (0, 0.5, 1)
    assert (
        json.loads((out / "lm-eval-tiny_addition.json").read_text("utf-8"))["metrics"]
        == (result["metrics"])
    )
    (out / "lm-eval-tiny_addition.json").write_text('{"task": "lm-', encoding="utf-8")  # killed
    assert (
        run_harness("tiny_addition", "tiny", model_dir, out, identity=one, device="cpu") == result
    )
    monkeypatch.setattr(lm_eval, "simple_evaluate", None)  # must not be called again
    again = run_harness("tiny_addition", "tiny", model_dir, out, identity=one, device="cpu")
    assert again["metrics"] == result["metrics"]
