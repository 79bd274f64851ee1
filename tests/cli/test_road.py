"""`minimind road` with a tiny road over local files, and the packaged roads."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from minimind.cli import road, road_plan
from minimind.cli.main import app
from minimind.cli.road import stage_recipes
from minimind.cli.road_results import last_adapter
from minimind.config import Recipe
from minimind.config.load import packaged_recipes
from minimind.config.road import ROADS, load_road
from minimind.data.registry import find
from minimind.data.textbook import DEMO_QUESTIONS
from tests.support.commands import fast_python
from tests.support.plots import draw_equal_plots_once

SHORT = """
settings.data = {seq_len = 128, validation_fraction = 0.1}
settings.training = {steps = 2, global_batch_size = 4, precision = "fp32"}
settings.validation = {num_sequences = 4, prompts = []}
"""
ROAD = f"""
[tokenizer]
data = ["text.jsonl"]
vocab_size = 300

[stages.pretrain]
recipe = "pretrain-small"
data = ["text.jsonl"]
settings.model.preset = "nano"
{SHORT}
[stages.sft]
recipe = "sft-small"
data = ["chat.jsonl"]
{SHORT}
[stages.dpo]
recipe = "dpo-small"
data = ["pairs.jsonl@0.5"]
{SHORT}
[stages.adapter]
recipe = "lora-small"
data = ["chat.jsonl"]
{SHORT}
[evaluation]
tasks = ["bpb:text.jsonl", "choice:questions.csv"]
questions = ["第1段多长？", "{DEMO_QUESTIONS[0]}"]
"""


ENVIRONMENT = {"MINIMIND_CACHE": "cache", "COLUMNS": "400", "HF_HUB_OFFLINE": "1"}


def run(folder: Path, *arguments: str, status: int = 0) -> Result:
    with contextlib.chdir(folder):
        done = CliRunner().invoke(app, ["road", *arguments, "--device", "cpu"], env=ENVIRONMENT)
    assert done.exit_code == status, done.output + str(done.exception)
    return done


def error(folder: Path, *arguments: str) -> str:
    [line] = run(folder, *arguments, status=1).stderr.splitlines()
    return line


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    draw_equal_plots_once(monkeypatch)
    lengths = [(f"第{n}段多长？", f"{7 * n}公里。") for n in range(100)]
    texts = [{"text": f"长江第{n}段长{7 * n}公里。"} for n in range(200)]
    chats = [
        {"conversations": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in lengths
    ]
    pairs = [{"prompt": q, "chosen": a, "rejected": "不知道。"} for q, a in lengths]
    for name, records in (("text", texts), ("chat", chats), ("pairs", pairs)):
        lines = [json.dumps(record) for record in records]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "questions.csv").write_text(
        "question,A,B,C,D,answer\n一加一等于几？,1,2,3,4,B\n", encoding="utf-8"
    )
    (tmp_path / "tiny.toml").write_text(ROAD, encoding="utf-8")
    return tmp_path


def interrupt_when(folder: Path, metrics: Path, number: signal.Signals) -> str:
    """Run the road in a process, send it a signal after a stage's first step; return its output.

    metrics: the metrics.jsonl of that stage.
    """
    child = subprocess.Popen(
        [*fast_python(), "-m", "minimind", "road", "tiny.toml", "--device", "cpu"],
        cwd=folder,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while not metrics.is_file() or b'"train"' not in metrics.read_bytes():
            assert child.poll() is None, child.communicate()[0]
            time.sleep(0.01)
        child.send_signal(number)
        output, _ = child.communicate()
    finally:
        child.kill()
    assert child.returncode == 130, output
    return output


def modified(*paths: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in paths]


def weights(out: Path, stage: str) -> Path:
    return out / stage / "model" / "model.safetensors"


def write_road(folder: Path, *changes: tuple[str, str]) -> None:
    """Write tiny.toml with each first string replaced by the second, once."""
    text = ROAD
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    (folder / "tiny.toml").write_text(text, encoding="utf-8")


def test_a_road_is_interrupted_changed_resumed_and_repeated(folder: Path) -> None:
    out = folder / "out" / "tiny"
    sft = ROAD[ROAD.index("[stages.sft]") : ROAD.index("[stages.dpo]")]
    many_steps = (sft, sft.replace("steps = 2", "steps = 100, log_every = 1"))
    write_road(folder, many_steps)
    stopped = interrupt_when(folder, out / "sft" / "metrics.jsonl", signal.SIGINT)
    assert "1/6 the tokenizer" in stopped
    assert "3/6 sft, with the recipe sft-small" in stopped
    assert "stopped; run the same command again to resume" in stopped
    assert "Traceback" not in stopped
    finished = [weights(out, "pretrain"), out / "tokenizer"]
    times = modified(*finished)
    assert not (out / "dpo").exists()

    # The stage that has begun cannot change; the one after it can.
    write_road(folder)
    assert error(folder, "tiny.toml") == (
        f"error: {Path('out/tiny')} holds the results of another road: stages.sft.settings.training"
        ".steps was 100 and is now 2; stages.sft.settings.training.log_every was 1 and is now not "
        "set, but the stage sft has begun. Give the same road, choose another --out, or start over "
        f"with --fresh. To repeat only the steps that change, remove {Path('out/tiny/sft')}"
    )
    own = 'data = ["pairs.jsonl"]\nown_answers = ["chat.jsonl"]\nnum_own_answers = 6'
    write_road(folder, many_steps, ('data = ["pairs.jsonl@0.5"]', own))
    resumed = run(folder, "tiny.toml").output
    assert "stages.dpo.data was ['pairs.jsonl@0.5'] and is now ['pairs.jsonl']" in resumed
    assert f"{Path('out/tiny/pretrain')} is already finished" in resumed
    assert "resuming" in resumed and modified(*finished) == times
    lines = (out / "sft" / "metrics.jsonl").read_text("utf-8").splitlines()
    steps = [line["step"] for line in map(json.loads, lines) if line["kind"] == "train"]
    assert steps == list(range(1, 101))

    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert list(summary["stages"]) == ["pretrain", "sft", "dpo", "adapter"]
    assert summary["total_seconds"] >= summary["training_seconds"] > 0
    first, second = summary["questions"]
    assert {"after_pretraining", "after_fine_tuning", "after_preferences"} < first.keys()
    assert "correct" not in first and second["correct"] is False
    results = json.loads((out / "eval" / "summary.json").read_text("utf-8"))["models"]["tiny"]
    assert [m["questions"] for m in results.values() if "questions" in m] == [1]
    assert len(results) == 2
    page = (out / "report.html").read_text("utf-8")
    assert "<h2>Benchmarks</h2>" in page and "第1段多长？" in page
    assert "minimind chat out/tiny --adapter out/tiny/adapter\n" in resumed
    assert resumed.rstrip().endswith("minimind export web out/tiny --out out/tiny/page")
    final = out / "model" / "model.safetensors"
    assert final.read_bytes() == weights(out, "dpo").read_bytes()
    pairs = out / "own-answers" / "dpo.jsonl"
    assert 0 < len(pairs.read_text("utf-8").splitlines()) <= 6
    assert "own-answers/dpo.jsonl" in (out / "dpo" / "recipe.toml").read_text("utf-8")

    times = modified(final)
    pairs.unlink()  # of a finished stage: they are not needed any more
    again = run(folder, "tiny.toml").output
    assert not pairs.exists()
    assert "--fresh discards the results and runs the road again" in again
    assert modified(final) == times
    assert again[again.index("Summary") :] == resumed[resumed.index("Summary") :]


def test_pairs_of_a_road_are_kept_as_long_as_they_are_true(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = 'data = ["pairs.jsonl"]\nown_answers = ["chat.jsonl"]\nnum_own_answers = 6'
    sft = ROAD[ROAD.index("[stages.sft]") : ROAD.index("[stages.dpo]")]
    trained = (sft, sft.replace("steps = 2", "steps = 60"))  # gives answers
    write_road(folder, trained, ('data = ["pairs.jsonl@0.5"]', own))
    pairs = folder / "out" / "tiny" / "own-answers" / "dpo.jsonl"

    train_stage = road.train_stage

    def stop_at_dpo(recipe: Recipe, tokens: int | None) -> Any:
        if recipe.objective == "dpo":
            raise KeyboardInterrupt
        return train_stage(recipe, tokens)

    monkeypatch.setattr(road, "train_stage", stop_at_dpo)
    run(folder, "tiny.toml", status=130)
    written = pairs.stat().st_mtime_ns
    (folder / "chat.jsonl").touch()
    run(folder, "tiny.toml", status=130)
    assert pairs.stat().st_mtime_ns == written
    write_road(folder, trained, ('data = ["pairs.jsonl@0.5"]', own.replace("6", "7")))
    assert "is replaced: " in run(folder, "tiny.toml", status=130).output
    assert pairs.stat().st_mtime_ns != written
    pairs.with_suffix(".json").unlink()
    assert "no step of this road has written it" in error(folder, "tiny.toml")
    assert pairs.is_file()
    (folder / "out" / "tiny" / "dpo" / "checkpoints" / "step-00000001").mkdir(parents=True)
    pairs.unlink()
    assert "the stage dpo has begun to train on it" in error(folder, "tiny.toml")


def test_a_finished_road_is_changed_only_as_its_message_says(folder: Path) -> None:
    run(folder, "tiny.toml")
    out = folder / "out" / "tiny"
    kept = [weights(out, "pretrain"), weights(out, "sft")]
    times = modified(*kept)

    write_road(folder, ("vocab_size = 300", "vocab_size = 320"))
    assert error(folder, "tiny.toml") == (
        f"error: {Path('out/tiny')} holds the results of another road: tokenizer.vocab_size was "
        "300 and is now 320, but the tokenizer is trained. Give the same road, choose another "
        "--out, or start over with --fresh"
    )

    # Another evaluation of the same models is no other road.
    fewer = ('"第1段多长？", ', ""), (', "choice:questions.csv"', "")
    write_road(folder, *fewer)
    run(folder, "tiny.toml")
    assert len(json.loads((out / "summary.json").read_text("utf-8"))["questions"]) == 1
    assert modified(*kept) == times

    # A task that fails sets the exit status; the report shows the others.
    write_road(folder, *fewer, ('"bpb:text.jsonl"', '"bpb:text.jsonl", "lm-eval:no-such-task"'))
    failed = run(folder, "tiny.toml", status=1).output
    assert "tiny: lm-eval:no-such-task: " in failed and "Report with all curves" in failed
    write_road(folder, *fewer)

    # Repeat the last stages with other data, after removing what the message names.
    write_road(folder, *fewer, ("pairs.jsonl@0.5", "pairs.jsonl"))
    message = error(folder, "tiny.toml")
    assert "but the stage dpo has begun" in message
    names = message.rpartition(" remove ")[2].split(", ")
    assert names == [f"{Path('out/tiny', name)}" for name in ("dpo", "adapter", "model", "eval")]
    final = out / "model" / "model.safetensors"
    before = final.read_bytes()
    for name in names:
        shutil.rmtree(folder / name)
    run(folder, "tiny.toml")
    assert modified(*kept) == times
    assert final.read_bytes() == weights(out, "dpo").read_bytes() != before

    # --fresh removes the results of stages that the road no longer has.
    (folder / "tiny.toml").write_text(
        ROAD[: ROAD.index("[stages.sft]")] + "[evaluation]\n", encoding="utf-8"
    )
    run(folder, "tiny.toml", "--fresh")
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [
        "model",
        "pretrain",
        "report-plots",
        "tokenizer",
    ]
    assert modified(*kept[:1]) != times[:1]


def test_the_adapter_belongs_to_the_stage_that_it_started_from(folder: Path) -> None:
    """A stage after one with LoRA starts from the same model, not from the adapter."""
    dpo = ROAD[ROAD.index("[stages.dpo]") : ROAD.index("[stages.adapter]")]
    adapter = ROAD[ROAD.index("[stages.adapter]") : ROAD.index("[evaluation]")]
    write_road(folder, (dpo + adapter, adapter + dpo))
    out = Path("out") / "tiny"
    recipes = stage_recipes(load_road(str(folder / "tiny.toml")), out, "cpu")
    assert {name: recipe.model.init for name, recipe in recipes.items()} == {
        "pretrain": None,
        "sft": str(out / "pretrain"),
        "adapter": str(out / "sft"),
        "dpo": str(out / "sft"),
    }
    assert last_adapter(out, recipes) == (out / "sft", out / "adapter")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[stages.sft]", "[stage.sft]", "stage is not a setting; did you mean stages"),
        ('data = ["chat.jsonl"]', 'data = ["chats.jsonl"]', "there is no such file or folder"),
        ('"sft-small"', '"sft-smal"', "stages.sft: sft-smal: there is no such recipe"),
        (
            '"sft-small"',
            '"sft-small"\nown_answers = ["?"]',
            "only preference optimization (dpo) uses",
        ),
        ('"dpo-small"', '"dpo-small"\nown_answers = ["no"]', "there is no such file or folder"),
        ('"dpo-small"', '"dpo-small"\nown_answers = ["text.jsonl"]', "no conversation that ends"),
        ('"dpo-small"', '"dpo-small"\nown_answers = ["textbook:dialogues"]', "no such file"),
        ('"dpo-small"', '"dpo-small"\nnum_own_answers = 9', "num_own_answers needs own_answers"),
        ('"pretrain-small"', '"dpo-small"', "no stage before it pretrains one"),
        ('"dpo-small"', '"pretrain-small"', "but the stage sft has already done that"),
        ("[stages.dpo]", "[stages.model]", "'model' cannot be the name of a stage"),
        ('"choice:questions.csv"', '"chioce"', "--task chioce: unknown task"),
        ("vocab_size = 300", 'vocab_size = "300"', 'tiny.toml:4: tokenizer.vocab_size = "300"'),
        ("settings.model.preset", "settings.out", "settings.out: remove it"),
        ('["pairs.jsonl@0.5"]', '["minimind:dop"]', "minimind has no file 'dop'"),
    ],
)
def test_a_bad_road_is_one_message_before_any_work(
    folder: Path, old: str, new: str, message: str
) -> None:
    write_road(folder, (old, new))
    assert message in error(folder, "tiny.toml")
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("existing", "options"),
    [
        ("tokenizer", ["--fresh"]),
        ("own-answers", ["--fresh"]),
        ("sft", ["--fresh"]),
        ("eval", ["--fresh"]),
        ("model", []),
    ],
)
def test_folders_of_others_are_neither_removed_nor_used(
    folder: Path, existing: str, options: list[str]
) -> None:
    (folder / "out" / existing).mkdir(parents=True)
    (folder / "out" / existing / "config.json").write_text("{}")
    (folder / "text.jsonl").unlink()  # the data is read later
    assert error(folder, "tiny.toml", "--out", "out", *options) == (
        f"error: {Path('out', existing)} exists, but out has no time.json of minimind, so it is "
        "not from an earlier run of this command. Choose another --out, or move it away first"
    )
    assert [str(path.relative_to(folder)) for path in (folder / "out").rglob("*")] == [
        str(Path("out", existing)),
        str(Path("out", existing, "config.json")),
    ]


def test_results_of_a_demo_are_neither_removed_nor_used(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "time.json").write_text('{"command": "demo", "seconds": 1.0}')
    for options in ([], ["--fresh"]):
        assert error(folder, "tiny.toml", "--out", "out", *options) == (
            "error: out holds the results of `minimind demo`; choose another --out"
        )
    assert [path.name for path in (folder / "out").iterdir()] == ["time.json"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('["chat.jsonl"]', '["minimind:sft_mini"]'),
        ('"dpo-small"', '"dpo-small"\nown_answers = ["minimind:sft_mini"]'),
    ],
)
def test_data_that_is_not_there_is_not_downloaded_without_consent(
    folder: Path, old: str, new: str
) -> None:
    write_road(folder, (old, new))
    message = error(folder, "tiny.toml")
    assert "minimind:sft_mini (size: 1.74 GB, licence: apache-2.0, cc-by-nc-2.0)" in message
    assert not (folder / "out").exists()


def test_dry_run_lists_steps_and_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(road_plan, "_TRIAL_S", 0.01)
    output = run(folder, "tiny.toml", "--dry-run").output
    assert "Training takes about" in output and "on cpu" in output
    assert "your own" in output
    assert "give either --dry-run or --fresh" in error(folder, "tiny.toml", "--dry-run", "--fresh")
    for more in ([], ["--dry-run"]):
        message = error(folder, "tiny.toml", "--out", "text.jsonl", *more)
        assert message == "error: --out text.jsonl is a file; choose a folder"
    assert "--data" not in error(folder, "text.jsonl", "--dry-run")
    quiz = 'extends = "tiny.toml"\n[evaluation]\ntasks = ["quiz"]\n'  # reads no data
    (folder / "quiz.toml").write_text(quiz)
    assert "quiz" not in run(folder, "quiz.toml", "--dry-run").output
    dpo = 'own_answers = ["chat.jsonl"]\nrecipe = "dpo-small"\n'
    write_road(folder, ('recipe = "dpo-small"\ndata = ["pairs.jsonl@0.5"]', dpo))
    output = run(folder, "tiny.toml", "--dry-run").output
    assert "Training takes about" in output
    assert "the time for own answers is not included" in " ".join(output.split())
    assert not (folder / "out").exists()


def test_packaged_roads_name_recipes_and_published_data() -> None:
    assert list(packaged_recipes(ROADS)) == ["base", "moe", "night", "small"]
    for name in ("base", "moe", "small"):
        road = load_road(name)
        recipes = stage_recipes(road, Path("out"), "cpu")
        assert [recipe.objective for recipe in recipes.values()] == ["pretrain", "sft", "dpo"]
        assert [recipe.model.init for recipe in recipes.values()] == [
            None,
            str(Path("out/pretrain")),
            str(Path("out/sft")),
        ]
        stages = [find(source.path).stage for r in recipes.values() for source in r.data.sources]
        assert stages == ["pretrain", "sft", "dpo"]
        assert [find(path).stage for path in road.tokenizer.data] == ["pretrain"]
        assert [find(task).stage for task in road.evaluation.tasks] == ["eval", "eval"]
        assert tuple(road.evaluation.questions) == DEMO_QUESTIONS


def test_dry_run_of_a_packaged_road_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(road_plan, "_TRIAL_S", 0.0)
    output = run(tmp_path, "small", "--dry-run").output
    for text in ("minimind:sft_mini", "1.74 GB", "apache-2.0, cc-by-nc-2.0", "sft (sft-small)"):
        assert text in output
    assert "335 million" in output  # 1,241,043,656 bytes at 3.7 per token
    assert list(tmp_path.iterdir()) == []
