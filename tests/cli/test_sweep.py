"""`minimind sweep` and `minimind report` with the smallest models."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from minimind.cli.main import app
from minimind.cli.sweep import _finish, describe_failures
from minimind.config import load_recipe
from minimind.environment import num_cores
from minimind.errors import UsageError
from minimind.planning.sweep import Outcomes, PlannedRun, Watcher, device_settings, run_all
from tests.support.commands import PID_FILE, fast_executable, fast_python, pid_of
from tests.support.plots import draw_equal_plots_once
from tests.support.run_folders import write_run

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
NANO = (
    *("sweep", "pretrain-small", "model.preset=nano", "data.seq_len=32", "data.store=stores"),
    *("data.validation_fraction=0.1", "training.global_batch_size=4", "training.precision=fp32"),
    *("validation.num_sequences=4", "training.log_every=1", "--data", "text.jsonl"),
)


@pytest.fixture
def folder(tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    draw_equal_plots_once(monkeypatch)
    python = fast_executable(tmp_path)
    monkeypatch.setattr(sys, "executable", python)  # with which a sweep starts its runs
    with (tmp_path / "text.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(200):
            stream.write(json.dumps({"text": f"长江第{number}段长{7 * number}公里。"}) + "\n")
    (tmp_path / "tokenizer").symlink_to(tokenizer_dir)
    return tmp_path


def start(folder: Path, *arguments: str, pid_file: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*fast_python(), "-m", "minimind", *arguments],
        cwd=folder,
        env=os.environ | ENVIRONMENT | ({PID_FILE: str(pid_file)} if pid_file else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )


def run(folder: Path, *arguments: str, status: int = 0) -> str:
    with contextlib.chdir(folder):
        done = CliRunner().invoke(app, arguments, env=ENVIRONMENT)
    assert done.exit_code == status, done.output
    return done.output


def test_sweep_compares_variants_and_reports_failures(folder: Path) -> None:
    command = (*NANO, "--tokenizer", "tokenizer", "training.steps=3", "--devices", "cpu,cpu")
    heads = "model.num_attention_heads=4,3"
    output = run(folder, *command, heads, "model.num_hidden_layers=1,2", status=1)
    first, second = (f"num_attention_heads-4-num_hidden_layers-{layers}" for layers in (1, 2))
    assert f"{first}: finished" in output and f"{second}: finished" in output
    reason = "num_attention_heads (3) must be a multiple of num_key_value_heads (2)"
    third, fourth = (f"num_attention_heads-3-num_hidden_layers-{layers}" for layers in (1, 2))
    [line] = re.findall(r"^failed: .*", output, re.M)
    assert line.startswith(f"failed: {third}, {fourth}: ") and reason in line
    assert "loss by parameters: no fit: 2 different values" in output
    out = folder / "out" / "sweep"
    metrics = json.loads((out / "summary.json").read_text("utf-8"))
    assert set(metrics["runs"]) == {first, second} and len(metrics["failed"]) == 2
    assert metrics["settings"][second]["model.num_hidden_layers"] == 2
    assert "Scaling: pretrain" in (out / "report.html").read_text("utf-8")
    recipe = (out / second / "recipe.toml").read_text("utf-8")
    assert 'device = "cpu"' in recipe and "num_hidden_layers = 2" in recipe

    # Again, with one more value: finished runs are not trained again.
    before = (out / first / "summary.json").stat().st_mtime_ns
    more = (heads, "model.num_hidden_layers=1,2,3", "--json", "all.json")
    output = run(folder, *command, *more, status=1)
    assert (out / first / "summary.json").stat().st_mtime_ns == before
    assert len(json.loads((folder / "all.json").read_text("utf-8"))["runs"]) == 3

    output = run(folder, "report", "out/sweep", "nowhere", "--out", "page.html", status=1)
    assert "problem: nowhere: no such file or folder" in output
    assert (folder / "page.html").is_file() and (folder / "page.md").is_file()


@pytest.mark.slow
def test_a_stopped_sweep_is_resumed(folder: Path) -> None:
    command = (*NANO, "--tokenizer", "tokenizer", "optim.lr=1e-3,2e-3", "training.steps=60")
    process = start(folder, *command)
    metrics = folder / "out" / "sweep" / "lr-0.001" / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_text("utf-8").count("\n") < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 130, output
    assert "lr-0.001: stopped; the same command resumes it" in output
    assert "failed: lr-0.002: not started" in output
    assert not (folder / "out" / "sweep" / "lr-0.002").exists()
    assert "report" not in output
    run(folder, *command)
    steps = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    assert [line["step"] for line in steps if line["kind"] == "train"] == [*range(1, 61)]
    log = (folder / "out" / "sweep" / "logs" / "lr-0.001.log").read_text("utf-8")
    assert "resuming from step" in log


def test_a_sweep_with_only_invalid_variants_is_an_error(folder: Path) -> None:
    output = run(folder, *NANO, "optim.lrr=1,2", status=1)
    assert output.startswith("error: all 2 runs: ")
    assert output.count("did you mean optim.lr?") == 1


def test_the_table_has_the_metrics_of_variants_named_as_their_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a sweep of fine-tuning that starts from a run of a sweep of pretraining."""
    draw_equal_plots_once(monkeypatch)
    base = write_run(tmp_path / "pretrain" / "seed=1")
    write_run(tmp_path / "sft" / "seed=1", init=f"{base}", objective="sft", loss=1.625)
    outcomes = Outcomes(["seed=1"])
    _finish(tmp_path / "sft", {"seed=1": {"seed": 1}}, outcomes, None)
    assert "1.625" in capsys.readouterr().out
    _finish(tmp_path / "sft", {"seed=1": {}}, outcomes, None)  # nothing varies
    assert "1.625" in capsys.readouterr().out


def test_errors_that_runs_have_in_common_are_reported_once() -> None:
    assert describe_failures({"a": "no data", "b": "no data"}, 2) == ["all 2 runs: no data"]
    assert describe_failures({"a": "no data"}, 1) == ["a: no data"]
    failed = {"a": "no data", "b": "stopped", "c": "no data"}
    assert describe_failures(failed, 3) == ["a, c: no data", "b: stopped"]


def test_a_process_sees_only_its_own_gpu(
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
    assert device_settings(["cpu"]) == [("cpu", {})]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    shared = {"OMP_NUM_THREADS": str(max(1, num_cores() // 2))}
    assert device_settings(["cpu", "cpu"]) == [("cpu", shared)] * 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert device_settings(["cpu", "cpu"]) == [("cpu", {})] * 2


def test_a_missing_device_is_reported_once(folder: Path) -> None:
    output = run(folder, *NANO, "--tokenizer", "tokenizer", "--devices", "cuda:77", status=1)
    assert output.count("device cuda:77 is not available") == 1


def planned(folder: Path) -> PlannedRun:
    flags = {"model.preset": "nano", "data.seq_len": 32, "training.steps": 100_000}
    flags |= {"training.global_batch_size": 4, "validation.num_sequences": 4}
    flags |= {"data.sources": [str(folder / "text.jsonl")], "out": str(folder / "run")}
    flags |= {"data.store": str(folder / "stores"), "tokenizer": str(folder / "tokenizer")}
    return PlannedRun("a", load_recipe("pretrain-small", flags=flags).recipe, folder / "a.log")


def test_an_error_leaves_no_process_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class FullDisk(Watcher):
        def started(self, slot: int, planned: PlannedRun) -> None:
            raise OSError("No space left on device")

    class Recorded(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    with pytest.raises(OSError, match="No space left"):
        run_all([planned(folder)], [ENVIRONMENT], watcher=FullDisk())
    assert [process.poll() for process in started] == [-signal.SIGKILL]


def test_runs_end_when_the_sweep_is_killed(folder: Path) -> None:
    """Such as by the kernel, when memory runs out."""
    command = (*NANO, "--tokenizer", "tokenizer", "optim.lr=1e-3,2e-3", "training.steps=100_000")
    process = start(folder, *command, pid_file=folder / "pid")
    run_folder = folder / "out" / "sweep" / "lr-0.001"
    while not (run_folder / "metrics.jsonl").is_file():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(pid_of(process, folder / "pid"), signal.SIGKILL)
    process.communicate()
    FileLock(run_folder / ".lock", timeout=30).acquire()  # free when the process of the run is gone
