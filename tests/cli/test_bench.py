import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minimind.cli.main import app


@pytest.mark.slow
def test_bench_measures_training_and_decoding(tmp_path: Path) -> None:
    json_file = tmp_path / "bench.json"
    arguments = ["bench", "nano", "--device", "cpu", "--seconds", "0.01", "--price", "0.5"]
    environment = {"COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    result = CliRunner().invoke(app, [*arguments, "--json", str(json_file)], env=environment)
    assert result.exit_code == 0, result.output
    found = json.loads(json_file.read_text())
    training, decoding = found["training"], found["decoding"]
    assert training["parameters"] == 223_392
    assert training["utilisation"] == (
        training["tokens_per_second"] * training["flops_per_token"] / training["attainable_flops"]
    )
    assert list(decoding) in (["bf16", "int8"], ["fp32", "int8"])
    for rates in decoding.values():
        assert rates["streams_1"] > 0 and rates["streams_16"] > 0
        assert training["peak_memory_bytes"] > 100 << 20 < rates["peak_memory_bytes"]
    roads = [f"minimind road {name}" for name in ("small", "moe", "base")]
    assert [recipe["command"] for recipe in found["recipes"]] == ["minimind demo", *roads]
    for recipe in found["recipes"]:
        assert recipe["cost"] == 0.5 * recipe["seconds"] / 3600
        assert recipe["command"] in result.output
    assert "No machine has a record of nano yet" in result.output


def test_an_unknown_preset_is_an_error() -> None:
    result = CliRunner().invoke(app, ["bench", "smal"])
    assert result.exit_code == 1
    assert "there is no preset smal" in result.output and "did you mean small?" in result.output


@pytest.mark.slow
def test_ctrl_c_ends_the_measurement_and_its_process() -> None:
    command = [sys.executable, "-m", "minimind", "bench", "nano", "--device", "cpu"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and not _measures(children):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "\nstopped\n"


def _measures(children: Path) -> bool:
    """Return True while one of the processes is a measurement."""
    pids = children.read_text().split()
    return any(b"planning.bench" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids)
