"""Training and decoding on a GPU that is not there: see fake_gpu.py for what that shows."""

import json
import subprocess
import sys


def driven(what: str) -> dict[str, int | str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.fake_gpu", what], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def test_faults_are_found() -> None:
    assert driven("faults") == {
        "left on the CPU": "FakeTensorDeviceMismatchError",
        "left there on the way back": "FakeTensorDeviceMismatchError",
        "a shape by numbers": "DynamicOutputShapeException",
        "numbers asked for": 2,
    }


def test_a_training_step_waits_for_the_gpu_once_and_leaves_nothing_on_the_cpu() -> None:
    """For the norm of the gradient, by which a step with bad numbers is known."""
    found = driven("training")
    assert len(found) == 8 and set(found.values()) == {1}, found


def test_the_engine_waits_for_nothing_and_leaves_nothing_on_the_cpu() -> None:
    found = driven("inference")
    assert len(found) == 5 and set(found.values()) == {0}, found
