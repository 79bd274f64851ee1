import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from minimind.cli.main import app
from minimind.model import PRESETS, ModelConfig, Transformer, save_model
from minimind.tokenizer import Tokenizer
from tests.support.killing import kill_amid
from tests.support.services import save_models, serving

HEADER = "question,A,B,C,D,answer\n"


def run(folder: Path, *arguments: object, **variables: str) -> Result:
    """Run `eval` with its results in FOLDER/out."""
    words = ["eval", *map(str, arguments), "--out", str(folder / "out"), "--device", "cpu"]
    return CliRunner().invoke(app, words, env={"COLUMNS": "200"} | variables)


def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "summary.json").read_text("utf-8"))
    return found["models"]


@pytest.fixture(scope="module")
def models(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, `tiny` and `other`."""
    return save_models(tmp_path_factory.mktemp("models"), tokenizer)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmark") / "mine.csv"
    ask = "第{}个问题是什么，请在下列各项中选出正确的一项？,甲,乙,丙,丁,{}\n"
    rows = [ask.format(n, "ABCD"[n % 4]) for n in range(40)]
    path.write_text(HEADER + "".join(rows), encoding="utf-8")
    return path


def test_two_models_with_several_tasks(models: Path, benchmark: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "泰山在山东省。"}\n{"text": "长江流入东海。"}\n', encoding="utf-8")
    tasks = (
        "--task",
        f"choice:{benchmark}",
        "--task",
        f"bpb:{text}",
        "--task",
        "quiz",
        "--limit",
        6,
    )
    done = run(
        tmp_path,
        models / "tiny",
        models / "other" / "model",
        *tasks,
        "--json",
        tmp_path / "also.json",
    )
    assert done.exit_code == 0, done.output
    found = metrics(tmp_path)
    assert json.loads((tmp_path / "also.json").read_text("utf-8"))["models"] == found
    assert list(found) == ["tiny", "other"]
    for name, tasks_of in found.items():
        assert list(tasks_of) == [f"choice:{benchmark} (chat)", f"bpb:{text}", "quiz"]
        choice, bits, quiz = tasks_of.values()
        assert choice["questions"] == quiz["questions"] == 6
        assert f"{choice['correct']} / 6" in done.output
        assert quiz["fluent"] == 0
        assert "fluent" in done.output and "by keywords" in done.output
        assert f"{bits['bits_per_byte']:.4f}" in done.output
        assert list((tmp_path / "out" / name).glob("choice-*-mine.csv-chat/mine.csv"))
    assert "by group" not in done.output  # there is only one group


def test_groups_are_shown_with_their_intervals(models: Path, tmp_path: Path) -> None:
    rows = [
        {"id": f"{subject}-{n}", "subject": subject, "split": "val", "question": f"问题{n}？"}
        | {"A": "甲", "B": "乙", "C": "丙", "D": "丁", "answer": "A"}
        for subject in ("law", "operating_system")
        for n in range(4)
    ]
    (tmp_path / "ceval.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    done = run(tmp_path, models / "tiny", models / "other", "--task", "ceval", "--data", tmp_path)
    assert done.exit_code == 0, done.output
    _, _, table = done.output.partition("ceval (chat), by group")
    groups = metrics(tmp_path)["tiny"]["ceval (chat)"]["by_group"]
    assert list(groups) == ["STEM", "humanities"]
    for group in groups.values():
        assert f"{group['accuracy']:.1%} (" in table
        assert f"{group['correct']} / 4, chance 25%" in table


def test_a_second_run_reuses_all_results(models: Path, benchmark: Path, tmp_path: Path) -> None:
    words = (models / "tiny", "--task", f"choice:{benchmark}", "--style", "letter", "--shots", 0)
    assert run(tmp_path, *words).exit_code == 0
    [first] = metrics(tmp_path)["tiny"].values()
    assert run(tmp_path, *words).exit_code == 0
    [second] = metrics(tmp_path)["tiny"].values()
    assert (first["asked_now"], second["asked_now"]) == (40, 0)
    assert first["by_subject"] == second["by_subject"]


def test_a_killed_evaluation_is_resumed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """SIGKILL in the middle of the questions."""
    benchmark = tmp_path / "long.csv"
    rows = [f"{'泰山在山东省。' * 20}{n}？,甲,乙,丙,丁,A\n" for n in range(800)]
    benchmark.write_text(HEADER + "".join(rows), encoding="utf-8")
    shape = {"vocab_size": tokenizer.vocab_size}
    save_model(tmp_path / "m", Transformer(ModelConfig(**PRESETS["nano"] | shape)), tokenizer)
    words = ["eval", "m", "--task", "choice:long.csv", "--out", "out", "--device", "cpu"]
    results = tmp_path / "out" / "m" / "choice-long.csv-chat.jsonl"
    kept = kill_amid(words, tmp_path, results, 5_000)
    assert 1 < len(kept) < 801
    with contextlib.chdir(tmp_path):
        done = run(tmp_path, tmp_path / "m", "--task", "choice:long.csv")
    assert done.exit_code == 0, done.output
    found = metrics(tmp_path)["m"]["choice:long.csv (chat)"]
    assert (found["asked_now"], found["questions"]) == (801 - len(kept), 800)
    lines = results.read_bytes().splitlines()
    assert lines[: len(kept)] == kept
    assert len({json.loads(line)["id"] for line in lines[1:]}) == 800


def test_failures_are_reported_and_the_rest_continues(
    models: Path, benchmark: Path, tmp_path: Path
) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    words = ("--task", "ceval", "--task", f"choice:{benchmark}", "--data", nothing)
    done = run(tmp_path, tmp_path / "nowhere", models / "tiny", *words)
    assert done.exit_code == 1
    assert "no such directory" in done.output
    assert "found no ceval" in done.output
    assert metrics(tmp_path)["tiny"][f"choice:{benchmark} (chat)"]["questions"] == 40
    assert "Traceback" not in done.output


def test_failed_questions_give_exit_status_1(
    benchmark: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Only the question with a token whose embedding is NaN fails."""
    shape = {"vocab_size": tokenizer.vocab_size, "tie_word_embeddings": False}
    model = Transformer(ModelConfig(**PRESETS["nano"] | shape))
    with benchmark.open(encoding="utf-8") as file:
        lines = file.read().splitlines()
    bad = tokenizer.encode("$")
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = float("nan")
    save_model(tmp_path / "damaged", model, tokenizer)
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "泰山在山东省。"}\n{}\n', encoding="utf-8")
    (tmp_path / "mine.csv").write_text("\n".join([*lines, "$？,甲,乙,丙,丁,A"]) + "\n", "utf-8")
    tasks = ("--task", f"choice:{tmp_path / 'mine.csv'}", "--task", f"bpb:{text}")
    done = run(tmp_path, tmp_path / "damaged", *tasks)
    assert done.exit_code == 1
    assert "1 failed, the first: mine-42: the model's logits are not finite" in (
        " ".join(done.output.split())
    )
    assert "1 document " in done.output
    assert "1 invalid line, the first: " in done.output
    choice, bits = metrics(tmp_path)["damaged"].values()
    assert (choice["failed"], choice["questions"], bits["documents"]) == (1, 40, 1)
    again = run(tmp_path, tmp_path / "damaged", *tasks, "--limit", 10)
    assert again.exit_code == 1


def test_tasks_on_different_data_have_separate_results(models: Path, tmp_path: Path) -> None:
    """In one command, in a second one, and with --fresh."""
    texts = {"zh": "泰山在山东省。", "en": "The river.", "x": "x"}
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
        (tmp_path / name / "mine.csv").write_text(f"{HEADER}{text},1,2,3,4,A\n", encoding="utf-8")
    with contextlib.chdir(tmp_path):
        first = [f"{kind}" for kind in ("bpb:zh/a.jsonl", "choice:zh/mine.csv", "bpb:en/a.jsonl")]
        words = [word for task in first for word in ("--task", task)]
        for more in ((), ("--fresh",)):
            done = run(Path(), models / "tiny", *words, *more)
            assert done.exit_code == 0, done.output
        done = run(
            Path(), models / "tiny", "--task", "bpb:x/a.jsonl", "--task", "choice:x/mine.csv"
        )
        assert done.exit_code == 0, done.output
        folder = Path("out", "tiny")
        sizes = {
            path.name: json.loads(path.read_text("utf-8")).get("bytes")
            for path in folder.glob("*.json")
        }
        assert sizes == {
            "bpb-zh-a.jsonl.json": len(texts["zh"].encode()),
            "bpb-en-a.jsonl.json": 10,
            "bpb-x-a.jsonl.json": 1,
            "choice-zh-mine.csv-chat.json": None,
            "choice-x-mine.csv-chat.json": None,
        }
        Path("zh-a.jsonl").write_text('{"text": "a"}\n')
        both = run(Path(), models / "tiny", "--task", "bpb:zh/a.jsonl", "--task", "bpb:zh-a.jsonl")
        assert both.exit_code == 1
        assert "--task bpb:zh-a.jsonl would have the same file name" in both.output


def test_results_of_another_evaluation_are_not_overwritten(
    models: Path, benchmark: Path, tmp_path: Path
) -> None:
    words = ("--task", f"choice:{benchmark}", "--limit", 5)
    assert run(tmp_path, models / "tiny", *words).exit_code == 0
    assert run(tmp_path, models / "tiny", *words[:-1], 6).exit_code == 1
    refused = run(tmp_path, models / "tiny", *words, "--context", 64)
    assert refused.exit_code == 1
    assert "another evaluation (context differ)" in refused.output
    assert run(tmp_path, models / "tiny", *words, "--context", 64, "--fresh").exit_code == 0


def test_contamination_is_reported(models: Path, benchmark: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    text = "请听题：第7个问题是什么，请在下列各项中选出正确的一项？答：甲。"
    data.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    done = run(tmp_path, models / "tiny", "--task", f"choice:{benchmark}", "--contamination", data)
    assert done.exit_code == 0, done.output
    found = metrics(tmp_path)["tiny"][f"choice:{benchmark} (chat)"]["contamination"]
    assert found["found"] == 1
    assert found["without"]["questions"] == 39
    assert "Questions in the training data" in done.output
    done = run(
        tmp_path, models / "tiny", "--task", f"choice:{benchmark}", "--contamination", "gone"
    )
    assert done.exit_code == 1
    assert "there is no such file" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--task", "chess"), "--task chess: unknown task; choose from bpb, ceval"),
        (("--task", "quiz:q.jsonl"), "--task quiz:q.jsonl: the quiz reads no data; give --task q"),
        (("--task", "ceval"), "not downloaded yet: ceval:exam (size: unknown, licence: cc-by-nc"),
        (("--task", "c3"), "c3 needs its data: give --data DIR"),
        (("--task", "choice"), "choice needs a file"),
        (("--task", "bpb"), "bpb needs text"),
        (
            ("--task", "ceval", "--task", "mmlu", "--data", __file__),
            f"--data {__file__}: this file would be the data of ceval and mmlu; name the data of "
            "each task: --task ceval:PATH --task mmlu:PATH",
        ),
        (("--task", "lm-eval:arc", "--context", 64), "--context does not apply to lm-eval:arc"),
    ],
)
def test_invalid_command_lines(
    models: Path, tmp_path: Path, words: tuple[object, ...], message: str
) -> None:
    done = run(tmp_path, models / "tiny", *words)
    assert done.exit_code == 1
    assert message in done.output
    two = run(tmp_path, models / "tiny", models / "other", "--task", "quiz", "--adapter", "a")
    assert (two.exit_code, "one MODEL" in two.output) == (1, True)


def test_a_service_generates_but_gives_no_likelihoods(
    models: Path, benchmark: Path, tmp_path: Path
) -> None:
    with serving(models, tmp_path / "log") as process:
        url = f"{process.url}#other"
        done = run(tmp_path, url, "--task", "quiz", "--task", f"choice:{benchmark}", "--limit", 9)
    assert done.exit_code == 1
    assert "a remote model returns no log-likelihoods" in done.output
    there = metrics(tmp_path)["other"]["quiz"]
    assert there["questions"] == 9
    here = run(tmp_path / "here", models / "other", "--task", "quiz", "--limit", 9)
    assert here.exit_code == 0
    answers = [
        json.loads(line)["answer"]
        for folder in (tmp_path, tmp_path / "here")
        for line in sorted((folder / "out" / "other" / "quiz.jsonl").read_text().splitlines()[1:])
    ]
    assert answers[:9] == answers[9:]
    gone = run(tmp_path, process.url, "--task", "quiz")
    assert gone.exit_code == 1
    assert "cannot be reached" in gone.output


def test_invalid_models_are_reported_once_with_all_reasons(
    models: Path, benchmark: Path, tmp_path: Path
) -> None:
    broken, nowhere = tmp_path / "broken", tmp_path / "nowhere"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    tasks = ("--task", f"choice:{benchmark}", "--limit", 4, "--style", "letter")
    done = run(tmp_path, broken, nowhere, models / "tiny", *tasks)
    assert done.exit_code == 1
    lines = done.output.splitlines()
    for path in (broken, nowhere):
        failure = next(line for line in lines if line.startswith(f"failed: {path}: "))
        assert not failure.startswith(f"failed: {path}: {path}: ")
    failure = next(line for line in lines if line.startswith(f"{broken} failed: "))
    ours, _, theirs = failure.partition("transformers cannot load it either: ")
    assert "is not a tokenizer directory" in ours
    assert theirs
    assert "some questions had 0 few-shot examples instead of 5" in done.output
