"""Checkpoints are written in the background while training continues."""

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest

from minimind.errors import ResourceError
from minimind.training.checkpoint_writer import CheckpointWriter
from tests.support.checkpoints import NUMBERS, assert_intact, assert_refused, latest, names
from tests.support.small_runs import tensors


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A writable copy of `saved`."""
    return shutil.copytree(saved, tmp_path / "run")


class Gate:
    """Blocks a write until it is opened."""

    def __init__(self) -> None:
        self._open = threading.Event()

    def __call__(self) -> None:
        assert self._open.wait(60)

    def open(self) -> None:
        self._open.set()

    def open_soon(self) -> None:
        threading.Timer(0.1, self.open).start()


def test_later_changes_of_the_tensors_are_not_written(tmp_path: Path) -> None:
    gate, content = Gate(), tensors(7, NUMBERS)
    with CheckpointWriter(tmp_path, keep=2) as writer:
        writer.save(7, **content, before_write=gate)
        writer.check()  # does not wait
        assert not (tmp_path / "checkpoints").exists()
        content["model"]["weight"].zero_()
        content["optimizer"]["moment"].zero_()
        content["state"]["text"] = "other"
        gate.open()
    assert_intact(latest(tmp_path)[0])


def test_checkpoints_are_written_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with CheckpointWriter(tmp_path, keep=9) as writer:
        for step in (7, 14, 21):
            gate = Gate()
            writer.save(step, **tensors(step, NUMBERS), before_write=gate)
            assert names(tmp_path) == [f"step-{s:08}" for s in (7, 14, 21) if s < step]
            gate.open_soon()
    assert names(tmp_path) == ["step-00000007", "step-00000014", "step-00000021"]
    assert latest(tmp_path)[1] == []


@pytest.mark.parametrize("method", ["check", "save", "wait"])
def test_the_error_of_a_write_is_raised_in_the_training_thread(
    run: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CheckpointWriter(run, keep=2)

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: fail())
        writer.save(21, **tensors(21, NUMBERS))
        assert writer._thread
        writer._thread.join()
    with pytest.raises(ResourceError, match=r"Input/output error.*Older checkpoints are") as caught:
        {
            "check": writer.check,
            "wait": writer.wait,
            "save": lambda: writer.save(28, **tensors(28, NUMBERS)),
        }[method]()
    assert_refused(run, str(caught.value))
    writer.save(28, **tensors(28, NUMBERS))
    writer.wait()
    assert latest(run)[0].step == 28


def test_an_exception_waits_for_the_write_and_is_raised(tmp_path: Path) -> None:
    gate = Gate()
    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path, keep=2) as writer:
        writer.save(7, **tensors(7, NUMBERS), before_write=gate)
        gate.open_soon()
        raise ZeroDivisionError
    assert names(tmp_path) == ["step-00000007"]


def test_a_keyboard_interrupt_does_not_wait(tmp_path: Path) -> None:
    gate = Gate()
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path, keep=2) as writer:
        writer.save(7, **tensors(7, NUMBERS), before_write=gate)
        raise KeyboardInterrupt
    assert not (tmp_path / "checkpoints").exists()
    gate.open()
    writer.wait()  # so that nothing outlives the test


def test_on_a_full_disk_the_error_says_what_a_checkpoint_needs(
    tmp_path: Path,
) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with (
        pytest.raises(ResourceError, match="it needs 24,000 bytes"),
        CheckpointWriter(tmp_path, keep=2) as writer,
    ):
        writer.save(7, **tensors(7, NUMBERS))
        raise ResourceError("metrics.jsonl: cannot be written")
