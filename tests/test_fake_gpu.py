"""Training and decoding on a simulated GPU; fake_gpu.py describes what this proves."""

import json
import subprocess
import sys


def run_on_fake_gpu(work: str) -> dict[str, int | str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.fake_gpu", work], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def test_faults_are_detected() -> None:
    assert run_on_fake_gpu("faults") == {
        "CPU tensor in forward": "FakeTensorDeviceMismatchError",
        "CPU tensor in backward": "FakeTensorDeviceMismatchError",
        "shape that depends on values": "DynamicOutputShapeException",
        "values read": 2,
    }


def test_training_step_synchronizes_once_and_leaves_no_tensor_on_the_cpu() -> None:
    """The gradient norm is read, to detect a step that is not finite."""
    syncs = run_on_fake_gpu("training")
    assert len(syncs) == 8 and set(syncs.values()) == {1}, syncs


def test_engine_never_synchronizes_and_leaves_no_tensor_on_the_cpu() -> None:
    syncs = run_on_fake_gpu("inference")
    assert len(syncs) == 5 and set(syncs.values()) == {0}, syncs
