"""`minimind sweep` and `minimind report` with the smallest models."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minimind.errors import UsageError
from minimind.planning.sweep import device_settings

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
NANO = (
    *("sweep", "pretrain-small", "model.preset=nano", "data.seq_len=32", "data.store=stores"),
    *("data.validation_fraction=0.1", "training.global_batch_size=4", "training.precision=fp32"),
    *("validation.num_sequences=4", "training.log_every=1", "--data", "text.jsonl"),
)


@pytest.fixture
def place(tokenizer_dir: Path, tmp_path: Path) -> Path:
    with (tmp_path / "text.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(200):
            stream.write(json.dumps({"text": f"长江第{number}段长{7 * number}公里。"}) + "\n")
    (tmp_path / "tokenizer").symlink_to(tokenizer_dir)
    return tmp_path


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "minimind", *arguments],
        cwd=place,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )


def run(place: Path, *arguments: str, status: int = 0) -> str:
    process = start(place, *arguments)
    said, _ = process.communicate(timeout=250)
    assert process.returncode == status, said
    return said


def test_sweep_compares_variants_and_reports_failures(place: Path) -> None:
    command = (*NANO, "--tokenizer", "tokenizer", "training.steps=3", "--devices", "cpu,cpu")
    heads = "model.num_attention_heads=4,3"
    said = run(place, *command, heads, "model.num_hidden_layers=1,2", status=1)
    first, second = (f"num_attention_heads-4-num_hidden_layers-{layers}" for layers in (1, 2))
    assert f"{first}: finished" in said and f"{second}: finished" in said
    reason = "num_attention_heads (3) must be a multiple of num_key_value_heads (2)"
    assert len(re.findall(r"^failed: .*\b" + re.escape(reason), said, re.M)) == 2
    assert "loss by parameters: no fit: 2 different values" in said
    out = place / "out" / "sweep"
    metrics = json.loads((out / "summary.json").read_text("utf-8"))
    assert set(metrics["runs"]) == {first, second} and len(metrics["failed"]) == 2
    assert metrics["settings"][second]["model.num_hidden_layers"] == 2
    assert "Scaling: pretrain" in (out / "report.html").read_text("utf-8")
    recipe = (out / second / "recipe.toml").read_text("utf-8")
    assert 'device = "cpu"' in recipe and "num_hidden_layers = 2" in recipe

    # Again, with one more value: what is finished is left as it is.
    before = (out / first / "summary.json").stat().st_mtime_ns
    more = (heads, "model.num_hidden_layers=1,2,3", "--json", "all.json")
    said = run(place, *command, *more, status=1)
    assert (out / first / "summary.json").stat().st_mtime_ns == before
    assert len(json.loads((place / "all.json").read_text("utf-8"))["runs"]) == 3

    said = run(place, "report", "out/sweep", "nowhere", "--out", "page.html", status=1)
    assert "problem: nowhere: there is nothing" in said
    assert (place / "page.html").is_file() and (place / "page.md").is_file()


@pytest.mark.slow
def test_a_sweep_that_is_stopped_goes_on(place: Path) -> None:
    command = (*NANO, "--tokenizer", "tokenizer", "optim.lr=1e-3,2e-3", "training.steps=60")
    process = start(place, *command)
    metrics = place / "out" / "sweep" / "lr-0.001" / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_text("utf-8").count("\n") < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 130, said
    assert "lr-0.001: stopped; the same command resumes it" in said
    assert "failed: lr-0.002: not started" in said
    assert not (place / "out" / "sweep" / "lr-0.002").exists()
    assert "report" not in said
    run(place, *command)
    steps = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    assert [line["step"] for line in steps if line["kind"] == "train"] == [*range(1, 61)]
    log = (place / "out" / "sweep" / "logs" / "lr-0.001.log").read_text("utf-8")
    assert "resuming from step" in log


def test_all_variants_wrong_is_a_mistake_of_the_command(place: Path) -> None:
    said = run(place, *NANO, "optim.lrr=1,2", status=1)
    assert said.startswith("error: ") and "did you mean optim.lr?" in said


def test_a_numbered_gpu_is_the_only_one_that_its_process_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    one, two = device_settings(["cuda:0", "cuda:1"])
    assert one == ("cuda", {"CUDA_VISIBLE_DEVICES": "0"})
    assert two == ("cuda", {"CUDA_VISIBLE_DEVICES": "1"})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert device_settings(["cuda:1"]) == [("cuda", {"CUDA_VISIBLE_DEVICES": "7"})]
    with pytest.raises(UsageError, match="allows only 5,7"):
        device_settings(["cuda:2"])
    with pytest.raises(UsageError, match="devices must be of one kind"):
        device_settings(["cuda:0", "cpu"])
    assert device_settings(["cpu", "cpu"]) == [("cpu", {})] * 2


def test_a_missing_device_is_reported_once(place: Path) -> None:
    said = run(place, *NANO, "--tokenizer", "tokenizer", "--devices", "cuda:77", status=1)
    assert said.count("device cuda:77 is not available") == 1
