"""`minimind demo`, whole, with models far too small to learn much; its clock; README commands."""

import contextlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard
from typer.testing import CliRunner, Result

import minimind
from minimind.cli import demo as verb
from minimind.cli.demo import timed
from minimind.cli.main import app

STAGES = ("pretrain", "sft-single", "sft-multi", "dpo", "identity")


def demo(folder: Path, model: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "minimind", "demo", "--model", model, "--out", "out"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("model", ["nano", "nano-moe"])
def test_the_whole_road(tmp_path: Path, model: str) -> None:
    first = demo(tmp_path, model)
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert set(summary["stages"]) == set(STAGES)
    assert summary["stages"]["pretrain"]["bits_per_byte"] < summary["unigram_bits_per_byte"]
    assert summary["quiz"]["questions"] == 400
    assert 0 <= summary["quiz"]["fluent"] <= 400
    assert summary["total_seconds"] >= summary["training_seconds"]
    assert [{"correct", "fluent"} <= set(one) for one in summary["eight"]] == [True] * 8
    assert summary["preferences"]["accuracy"] > summary["preferences"]["first_accuracy"]
    assert len(summary["identity"]["answers"]) == summary["identity"]["questions"] > 20
    answers = ("before_training", "after_pretraining", "after_fine_tuning", "after_preferences")
    assert [set(answers) <= set(one) for one in summary["eight"]] == [True] * 8
    assert (out / "model" / "model.safetensors").is_file()
    assert (out / "identity" / "adapter" / "adapter_model.safetensors").is_file()
    page = (out / "report.html").read_text("utf-8")
    for section in ("The eight questions", "Preferences", "A name of its own", "Quiz by subject"):
        assert f"<h2>{section}</h2>" in page
    assert ("<h2>Expert load</h2>" in page) == (model == "nano-moe")
    assert "--adapter out/identity" in first

    # Again: nothing is done twice, and the same is shown.
    model_time = (out / "model" / "model.safetensors").stat().st_mtime_ns
    again = demo(tmp_path, model)
    assert "finished before" in again
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == model_time
    assert again[again.index("Summary") :] == first[first.index("Summary") :]


# A few steps of each stage, on little text: what is left out is time alone.
FEW = {
    "training": {"steps": 4, "global_batch_size": 4, "log_every": 2},
    "validation": {"every": 2, "num_sequences": 4},
    "checkpoint": {"every": 2},
}
LITTLE = {
    "prose_characters": 60_000,
    "held_out_characters": 3_000,
    "single_turn": 400,
    "multi_turn": 100,
    "preference_pairs": 80,
    "exam_questions": 20,
}
README_COMMANDS = [
    ".venv/bin/minimind chat out/demo",
    ".venv/bin/minimind chat out/demo --adapter out/demo/identity",
    'minimind data inspect "texts/*.jsonl.zst"',
    "minimind tokenizer inspect out/tokenizer",
    'minimind generate out/small "秦始皇是"',
    "minimind chat out/small-chat",
    "minimind checkpoints list out/small",
    "minimind checkpoints verify out/small",
    "minimind checkpoints extract out/small --out out/best",
    "minimind pretrain pretrain-base optim.lr=5e-4 training.global_batch_size=64 --explain",
    "minimind plan pretrain-base --device cuda --memory 2GB",
    "minimind chat out/demo --adapter out/me",
    "minimind chat out/small-chat --context 2048",
    "minimind chat out/small-chat --context 2048 --rope-scaling linear",
    "minimind report out/demo",
]


@pytest.fixture(scope="module")
def few_steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A folder with `out/demo`, made by few steps, and what the command printed."""
    folder = tmp_path_factory.mktemp("demo")
    whole = verb._recipe

    def short(*arguments: Any) -> Any:
        recipe = whole(*arguments)
        parts = {name: getattr(recipe, name).model_copy(update=few) for name, few in FEW.items()}
        return recipe.model_copy(update=parts)

    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setattr(verb, "_recipe", short)
        patch.setattr(verb, "_CORPUS", LITTLE)
        patch.setattr(verb, "_VOCAB_SIZE", 500)
        patch.setattr(verb, "_QUIZ_QUESTIONS", 8)
        patch.setattr(verb, "_ANSWER_TOKENS", 8)
        done = CliRunner().invoke(app, ["demo", "--model", "nano"])
    assert done.exit_code == 0, done.output
    return folder, done


def test_all_stages_in_few_steps(few_steps: tuple[Path, Result]) -> None:
    folder, done = few_steps
    out = folder / "out" / "demo"
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert tuple(summary["stages"]) == STAGES
    assert [stage["tokens"] > 0 for stage in summary["stages"].values()] == [True] * 5
    assert summary["quiz"]["questions"] == len(summary["eight"]) == 8
    assert (out / "model" / "model.safetensors").is_file()
    assert "<h2>The eight questions</h2>" in (out / "report.html").read_text("utf-8")
    assert done.output.rstrip().endswith("minimind chat out/demo --adapter out/demo/identity")


def test_commands_of_the_readme_run(few_steps: tuple[Path, Result]) -> None:
    folder, _ = few_steps
    for name, made in [
        ("small", "demo/pretrain"),
        ("small-chat", "demo/sft-multi"),
        ("tokenizer", "demo/tokenizer"),
        ("me", "demo/identity"),
    ]:
        (folder / "out" / name).symlink_to(made)
    (folder / "texts").mkdir()
    text = (folder / "out/demo/corpus/pretrain.jsonl").read_bytes()
    (folder / "texts" / "a.jsonl.zst").write_bytes(zstandard.compress(text))
    for language in ("README.md", "README.zh-CN.md"):
        lines = Path(minimind.__file__).parents[1].joinpath(language).read_text("utf-8").split("\n")
        commands = {line.partition("  #")[0].strip() for line in lines}
        assert set(README_COMMANDS) <= commands, language
    with contextlib.chdir(folder):
        for command in README_COMMANDS:
            [_, *words] = shlex.split(command)
            done = CliRunner().invoke(app, words, input="长江有多长？\n")
            assert done.exit_code == 0, f"{command}: {done.output}"


def test_the_time_of_earlier_starts_counts(tmp_path: Path) -> None:
    """Of one that ended and of one that was killed, up to the last line of its metrics."""
    path = tmp_path / "time.json"
    path.write_text(json.dumps({"seconds": 1_000.0}), encoding="utf-8")
    with pytest.raises(KeyboardInterrupt), timed(tmp_path) as total:
        assert total() >= 1_000
        raise KeyboardInterrupt
    kept = json.loads(path.read_text("utf-8"))
    assert kept.keys() == {"seconds"} and kept["seconds"] >= 1_000
    path.write_text(json.dumps({"seconds": 1_000.0, "began": 5_000.0}), encoding="utf-8")
    (tmp_path / "pretrain").mkdir()
    metrics = tmp_path / "pretrain" / "metrics.jsonl"
    metrics.write_text("{}\n")
    os.utime(path, (5_000, 5_000))
    os.utime(metrics, (5_300, 5_300))
    with timed(tmp_path) as total:
        assert total() >= 1_300
        assert json.loads(path.read_text("utf-8"))["seconds"] == 1_300
