"""Checkpoints for tests: small ones to save, and checks of what was loaded."""

from pathlib import Path

import torch

from minimind.training.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from tests.support.small_runs import tensors

NUMBERS = 3000  # in each of the two tensors: 12 kB per file
BYTES = 24_000


def save(run: Path, step: int, keep: int = 2, best: int | None = None) -> Path:
    return save_checkpoint(run, step, keep=keep, best=best, **tensors(step, NUMBERS))


def latest(run: Path) -> tuple[Checkpoint, list[str]]:
    """Return the newest valid checkpoint and the warnings about the others."""
    warnings: list[str] = []
    checkpoint = latest_checkpoint(run, warn=warnings.append)
    assert checkpoint is not None
    return checkpoint, warnings


def assert_intact(checkpoint: Checkpoint) -> None:
    saved = tensors(checkpoint.step, NUMBERS)
    assert checkpoint.path.name == f"step-{checkpoint.step:08}"
    assert checkpoint.state == saved["state"]
    for actual, expected in [
        (checkpoint.model, saved["model"]),
        (checkpoint.optimizer, saved["optimizer"]),
    ]:
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def names(run: Path) -> list[str]:
    """List the directory of checkpoints, without quarantined ones."""
    every = sorted(path.name for path in (run / "checkpoints").iterdir())
    return [name for name in every if not name.startswith(".damaged-")]


def assert_refused(run: Path, message: str) -> None:
    """Check the error of a failed save, and that it left nothing behind."""
    assert f"it needs {BYTES:,} bytes" in message
    assert "are free" in message and "Older checkpoints are intact" in message
    assert names(run) == ["step-00000007", "step-00000014"]
    checkpoint, warnings = latest(run)
    assert (checkpoint.step, warnings) == (14, [])
    assert_intact(checkpoint)
