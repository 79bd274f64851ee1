"""The lock of a run directory: one process at a time."""

import os
import signal
from pathlib import Path

import pytest

from minimind.errors import TrainingError
from minimind.training.lock import run_lock
from tests.support.small_runs import ForkServer


def test_a_lock_is_released(tmp_path: Path) -> None:
    for _ in range(2):
        with run_lock(tmp_path):
            assert str(os.getpid()) in (tmp_path / ".lock.json").read_text()
        assert not (tmp_path / ".lock.json").exists()


def test_an_error_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path):
        raise ZeroDivisionError
    with run_lock(tmp_path):
        pass


def test_the_error_names_the_holder_of_the_lock(tmp_path: Path) -> None:
    refused = f"{tmp_path} is in use by process {os.getpid()} on .+ since .+ choose another --out"
    with run_lock(tmp_path):
        for _ in range(2):
            with pytest.raises(TrainingError, match=refused), run_lock(tmp_path):
                pytest.fail("two processes hold the lock")
    (tmp_path / "other").mkdir()
    with run_lock(tmp_path), run_lock(tmp_path / "other"):
        pass


@pytest.mark.parametrize("content", ["", "{", '{"pid": 1}'])
def test_an_unreadable_holder_is_another_process(tmp_path: Path, content: str) -> None:
    with run_lock(tmp_path):
        (tmp_path / ".lock.json").write_text(content)
        with pytest.raises(TrainingError, match="in use by another process"), run_lock(tmp_path):
            pytest.fail("two processes hold the lock")


def test_a_killed_process_releases_the_lock(tmp_path: Path, fork_server: ForkServer) -> None:
    holder = fork_server.start("hold", run=tmp_path)
    holder.wait_for("held")
    with pytest.raises(TrainingError, match=f"process {holder.pid} "), run_lock(tmp_path):
        pytest.fail("two processes hold the lock")
    os.kill(holder.pid, signal.SIGKILL)
    assert holder.wait() == -signal.SIGKILL
    with run_lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock.json").read_text()


def test_the_holder_file_of_a_killed_process_is_ignored(
    tmp_path: Path, fork_server: ForkServer
) -> None:
    holder = fork_server.start("hold", run=tmp_path)
    holder.wait_for("held")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    note = (tmp_path / ".lock.json").read_text()
    assert str(holder.pid) in note
    with run_lock(tmp_path):
        (tmp_path / ".lock.json").write_text(note)  # as before the new holder writes its own
        with pytest.raises(TrainingError, match="in use by another process"), run_lock(tmp_path):
            pytest.fail("two processes hold the lock")
