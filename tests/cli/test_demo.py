"""`minimind demo` end to end with tiny models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

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
def test_full_demo(tmp_path: Path, model: str) -> None:
    first = demo(tmp_path, model)
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert set(summary["stages"]) == set(STAGES)
    assert summary["stages"]["pretrain"]["bits_per_byte"] < summary["unigram_bits_per_byte"]
    assert summary["quiz"]["questions"] == 400
    assert 0 <= summary["quiz"]["fluent"] <= 400
    assert summary["total_seconds"] >= summary["training_seconds"]
    assert [{"correct", "fluent"} <= set(one) for one in summary["questions"]] == [True] * 8
    assert summary["preferences"]["accuracy"] > summary["preferences"]["first_accuracy"]
    assert len(summary["identity"]["answers"]) == summary["identity"]["questions"] > 20
    answers = ("before_training", "after_pretraining", "after_fine_tuning", "after_preferences")
    assert [set(answers) <= set(one) for one in summary["questions"]] == [True] * 8
    assert (out / "model" / "model.safetensors").is_file()
    assert (out / "identity" / "adapter" / "adapter_model.safetensors").is_file()
    page = (out / "report.html").read_text("utf-8")
    for section in ("Answers after each stage", "Preferences", "A new name", "Quiz by subject"):
        assert f"<h2>{section}</h2>" in page
    assert ("<h2>Expert load</h2>" in page) == (model == "nano-moe")
    assert "--adapter out/identity" in first

    # A second run repeats no work and prints the same summary.
    model_time = (out / "model" / "model.safetensors").stat().st_mtime_ns
    again = demo(tmp_path, model)
    assert "already finished" in again
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == model_time
    assert again[again.index("Summary") :] == first[first.index("Summary") :]


def test_small_demo_runs_every_stage(small_demo: tuple[Path, str]) -> None:
    folder, output = small_demo
    out = folder / "out" / "demo"
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert tuple(summary["stages"]) == STAGES
    assert [stage["tokens"] > 0 for stage in summary["stages"].values()] == [True] * 5
    assert summary["quiz"]["questions"] == len(summary["questions"]) == 8
    assert (out / "model" / "model.safetensors").is_file()
    assert "<h2>Answers after each stage</h2>" in (out / "report.html").read_text("utf-8")
    assert "minimind chat out/demo --adapter out/demo/identity\n" in output
    assert output.rstrip().endswith("minimind export web out/demo --out out/demo/page")


@pytest.mark.parametrize(
    ("existing", "options"),
    [("tokenizer", ["--fresh"]), ("corpus", ["--fresh"]), ("dpo", ["--fresh"]), ("model", [])],
)
def test_folders_of_others_are_not_removed(
    existing: str, options: list[str], tmp_path: Path
) -> None:
    (tmp_path / existing).mkdir()
    (tmp_path / existing / "file").touch()
    arguments = ["demo", "--model", "nano", "--device", "cpu", "--out", str(tmp_path), *options]
    done = CliRunner().invoke(app, arguments)
    assert done.stderr == (
        f"error: {tmp_path / existing} exists, but {tmp_path} has no time.json of minimind, so it "
        "is not from an earlier run of this command. Choose another --out, or move it away first\n"
    )
    assert [path.name for path in tmp_path.rglob("*")] == [existing, "file"]
