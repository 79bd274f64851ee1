"""`minimind road` with a tiny road over local files, and the packaged roads."""

import contextlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from minimind.cli import road_plan
from minimind.cli.main import app
from minimind.cli.road import stage_recipes
from minimind.config.load import packaged_recipes
from minimind.config.road import ROADS, load_road
from minimind.data.registry import find
from minimind.data.textbook import DEMO_QUESTIONS
from minimind.training.trainer import Trainer

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
[evaluation]
tasks = ["bpb:text.jsonl", "choice:questions.csv"]
questions = ["第1段多长？", "{DEMO_QUESTIONS[0]}"]
"""


def run(folder: Path, *arguments: str, status: int = 0) -> Result:
    environment = {"MINIMIND_CACHE": "cache", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    with contextlib.chdir(folder):
        done = CliRunner().invoke(app, ["road", *arguments, "--device", "cpu"], env=environment)
    assert done.exit_code == status, done.output + str(done.exception)
    return done


def error(folder: Path, *arguments: str) -> str:
    [line] = run(folder, *arguments, status=1).stderr.splitlines()
    return line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
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


def test_a_road_is_interrupted_resumed_and_repeated(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Trainer.train

    def stop_in_sft(trainer: Trainer) -> object:
        if trainer.recipe.objective == "sft":
            raise KeyboardInterrupt
        return train(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", stop_in_sft)
        stopped = run(folder, "tiny.toml", status=130)
    assert "1/5 the tokenizer" in stopped.output
    assert "3/5 sft, with the recipe sft-small" in stopped.output
    out = folder / "out" / "tiny"
    pretrained = out / "pretrain" / "model" / "model.safetensors"
    finished = {path: path.stat().st_mtime_ns for path in (pretrained, out / "tokenizer")}

    resumed = run(folder, "tiny.toml").output
    assert f"{Path('out/tiny/pretrain')} is already finished" in resumed
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert list(summary["stages"]) == ["pretrain", "sft", "dpo"]
    assert summary["total_seconds"] >= summary["training_seconds"] > 0
    first, second = summary["eight"]
    assert {"after_pretraining", "after_fine_tuning", "after_preferences"} < first.keys()
    assert "correct" not in first and second["correct"] is False
    results = json.loads((out / "eval" / "summary.json").read_text("utf-8"))["models"]["tiny"]
    assert [m["questions"] for m in results.values() if "questions" in m] == [1]
    assert len(results) == 2
    page = (out / "report.html").read_text("utf-8")
    assert "<h2>Benchmarks</h2>" in page and "第1段多长？" in page
    assert resumed.rstrip().endswith("minimind export web out/tiny --out out/tiny/page")

    model_time = (out / "model" / "model.safetensors").stat().st_mtime_ns
    again = run(folder, "tiny.toml").output
    assert "--fresh discards the results and runs the road again" in again
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == model_time
    assert again[again.index("Summary") :] == resumed[resumed.index("Summary") :]

    # A changed road is noticed; another evaluation of the same models is no other road.
    changed = ROAD.replace("vocab_size = 300", "vocab_size = 320")
    (folder / "tiny.toml").write_text(changed, encoding="utf-8")
    assert error(folder, "tiny.toml") == (
        f"error: {Path('out/tiny')} holds the results of another road: tokenizer.vocab_size was "
        "300 and is now 320. Give the same road, choose another --out, or start over with --fresh"
    )
    fewer = ROAD.replace('"第1段多长？", ', "").replace(', "choice:questions.csv"', "")
    (folder / "tiny.toml").write_text(fewer, encoding="utf-8")
    run(folder, "tiny.toml")
    assert len(json.loads((out / "summary.json").read_text("utf-8"))["eight"]) == 1
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == model_time


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[stages.sft]", "[stage.sft]", "stage is not a setting; did you mean stages"),
        ('data = ["chat.jsonl"]', 'data = ["chats.jsonl"]', "there is no such file or folder"),
        ('"sft-small"', '"sft-smal"', "stages.sft: sft-smal: there is no such recipe"),
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
    assert old in ROAD
    (folder / "tiny.toml").write_text(ROAD.replace(old, new, 1), encoding="utf-8")
    assert message in error(folder, "tiny.toml")
    assert not (folder / "out").exists()


def test_data_that_is_not_there_is_not_downloaded_without_consent(folder: Path) -> None:
    (folder / "tiny.toml").write_text(
        ROAD.replace('["chat.jsonl"]', '["minimind:sft_mini"]'), encoding="utf-8"
    )
    message = error(folder, "tiny.toml")
    assert "minimind:sft_mini (size: 1.74 GB, licence: apache-2.0, cc-by-nc-2.0)" in message
    assert not (folder / "out").exists()


def test_dry_run_lists_steps_and_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(road_plan, "_TRIAL_S", 0.01)
    output = run(folder, "tiny.toml", "--dry-run").output
    assert "Training takes about" in output and "on cpu" in output
    assert "your own" in output
    assert not (folder / "out").exists()


def test_packaged_roads_name_recipes_and_published_data() -> None:
    assert list(packaged_recipes(ROADS)) == ["base", "moe", "small"]
    for name in packaged_recipes(ROADS):
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
