"""`minimind demo`, whole, with models far too small to learn much."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
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


@pytest.mark.parametrize("model", ["nano", "nano-moe"])
def test_the_whole_road(tmp_path: Path, model: str) -> None:
    first = demo(tmp_path, model)
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert set(summary["stages"]) == set(STAGES)
    assert summary["stages"]["pretrain"]["bits_per_byte"] < summary["unigram_bits_per_byte"]
    assert summary["quiz"]["questions"] == 400
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
