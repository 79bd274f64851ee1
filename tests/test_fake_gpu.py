"""Training and decoding on a simulated GPU; fake_gpu.py describes what this proves."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.commands import fast_python
from tests.support.shared import shared_directory

Results = dict[str, dict[str, int | str]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of all kinds of work on the simulated GPU, from one process."""

    def fill(folder: Path) -> None:
        command = [*fast_python(), "-m", "tests.support.fake_gpu"]
        command += ["training", "inference", "faults"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / "results.json").write_text(done.stdout)

    folder = shared_directory(tmp_path_factory, "fake-gpu", fill)
    return dict(json.loads((folder / "results.json").read_text()))


def test_faults_are_detected(results: Results) -> None:
    assert results["faults"] == {
        "CPU tensor in forward": "FakeTensorDeviceMismatchError",
        "CPU tensor in backward": "FakeTensorDeviceMismatchError",
        "shape that depends on values": "DynamicOutputShapeException",
        "values read": 2,
    }


def test_training_step_synchronizes_once_and_leaves_no_tensor_on_the_cpu(
    results: Results,
) -> None:
    """The gradient norm is read, to detect a step that is not finite."""
    syncs = results["training"]
    assert len(syncs) == 8 and set(syncs.values()) == {1}, syncs


def test_engine_never_synchronizes_and_leaves_no_tensor_on_the_cpu(results: Results) -> None:
    syncs = results["inference"]
    assert len(syncs) == 5 and set(syncs.values()) == {0}, syncs
