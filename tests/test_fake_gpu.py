"""Device synchronisations of training and decoding, counted on a fake GPU (fake_gpu.py)."""

import json
import subprocess
import sys


def measure(scenario: str) -> dict[str, int | str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.fake_gpu", scenario], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def test_the_fake_gpu_detects_faults() -> None:
    assert measure("faults") == {
        "left on the CPU": "FakeTensorDeviceMismatchError",
        "left there on the way back": "FakeTensorDeviceMismatchError",
        "a shape by numbers": "DynamicOutputShapeException",
        "numbers asked for": 2,
    }


def test_a_training_step_synchronises_once() -> None:
    """The one synchronisation reads the gradient norm, to detect a non-finite gradient."""
    found = measure("training")
    assert len(found) == 8 and set(found.values()) == {1}, found


def test_the_engine_never_synchronises() -> None:
    found = measure("inference")
    assert len(found) == 5 and set(found.values()) == {0}, found
