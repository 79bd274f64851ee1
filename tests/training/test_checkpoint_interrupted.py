"""Saves that are killed or run out of disk space."""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minimind.errors import ResourceError
from minimind.training.checkpoint import inspect_checkpoints
from tests.support.checkpoints import (
    NUMBERS,
    assert_intact,
    assert_refused,
    latest,
    names,
    save,
)
from tests.support.small_runs import REFUSED, ForkServer

# The process is killed at every write, flush, rename and removal of a save.


@pytest.mark.parametrize("replaces", [False, True])
def test_a_kill_at_any_point_leaves_a_valid_checkpoint(
    saved: Path, tmp_path: Path, fork_server: ForkServer, replaces: bool
) -> None:
    """replaces: a damaged checkpoint has the path of the new one."""
    loaded = []
    for point in itertools.count():
        run = shutil.copytree(saved, tmp_path / f"{point}")
        if replaces:
            shutil.copytree(
                run / "checkpoints" / "step-00000014", run / "checkpoints/step-00000021"
            )
        status = fork_server.run("save", run=run, step=21, numbers=NUMBERS, keep=2, point=point)
        if status == 0:
            break
        assert status == -signal.SIGKILL, fork_server.output.read_text()
        checkpoint, warnings = latest(run)
        assert_intact(checkpoint)
        loaded.append(checkpoint.step)
        assert len(warnings) == int(replaces and "step-00000021" in names(run) and loaded[-1] == 14)
        save(run, checkpoint.step + 7)
        assert names(run) == [f"step-{step:08}" for step in (checkpoint.step, checkpoint.step + 7)]
        shutil.rmtree(run)
    assert len(loaded) >= 30
    assert set(loaded) == {14, 21}
    assert loaded == sorted(loaded), "the new checkpoint stays once it exists"


@pytest.mark.parametrize("best", [7, 21])
def test_a_kill_at_any_point_leaves_the_best_checkpoint(
    saved: Path, tmp_path: Path, fork_server: ForkServer, best: int
) -> None:
    """best: the best step after the save. The best of the newest valid checkpoint must exist."""
    loaded = []
    for point in itertools.count():
        run = shutil.copytree(saved, tmp_path / f"{point}")
        options = {"step": 21, "numbers": NUMBERS, "keep": 1, "best": best}
        status = fork_server.run("save", run=run, point=point, **options)
        if status == 0:
            break
        checkpoint, warnings = latest(run)
        assert not warnings
        loaded.append(checkpoint.step)
        [best_checkpoint] = [
            one
            for one in inspect_checkpoints(run, verify_hashes=True)
            if one.step == (best if checkpoint.step == 21 else 7)
        ]
        assert not best_checkpoint.error
        shutil.rmtree(run)
    assert set(loaded) == {14, 21}
    assert names(run) == ([] if best == 21 else ["step-00000007"]) + ["step-00000021"]


# The disk is full at any point of a save.


def test_a_full_disk_at_any_point_leaves_older_checkpoints_intact(
    saved: Path, tmp_path: Path, fork_server: ForkServer
) -> None:
    refused = 0
    for point in itertools.count():
        run = shutil.copytree(saved, tmp_path / f"{point}")
        options = {"step": 21, "numbers": NUMBERS, "keep": 2, "how": "full"}
        status = fork_server.run("save", run=run, point=point, **options)
        message = fork_server.output.read_text()
        assert status in (0, REFUSED), message
        if names(run) == ["step-00000014", "step-00000021"] and status == 0:
            break  # no more points
        new, warnings = latest(run)
        assert not warnings
        assert_intact(new)
        if new.step == 14:
            assert status == REFUSED, message
            assert_refused(run, message)
            refused += 1
        save(run, 28)
        assert names(run)[1:] == ["step-00000028"]
        shutil.rmtree(run)
    assert refused >= 20


def test_a_file_size_limit_at_any_point_leaves_older_checkpoints_intact(
    saved: Path, tmp_path: Path, fork_server: ForkServer
) -> None:
    """The system refuses a write: that of the tensors, or that of the manifest."""
    for limit in [*range(0, 12_000, 600), 12_050]:
        run = shutil.copytree(saved, tmp_path / f"{limit}")
        options = {"step": 21, "numbers": NUMBERS, "keep": 2, "how": "limit"}
        assert fork_server.run("save", run=run, point=limit, **options) == REFUSED
        assert_refused(run, fork_server.output.read_text())
    assert fork_server.run("save", run=run, point=13_000, **options) == 0


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator[None]:
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount).returncode:
        pytest.skip("mounting a disk of a given size needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_save_to_a_small_disk_fails_cleanly(tmp_path: Path) -> None:
    run = tmp_path / "disk"
    with small_disk(run, 256 << 10):
        save(run, 7)
        save(run, 14)
        refused = 0
        for room in range(0, 32, 4):  # kB; 32 are enough
            ballast = os.statvfs(run).f_bavail * os.statvfs(run).f_bsize - (room << 10)
            (run / "ballast").write_bytes(bytes(ballast))
            with pytest.raises(ResourceError) as caught:
                save(run, 21)
            assert caught.value.__cause__ is not None
            assert_refused(run, str(caught.value))
            assert f"and {room << 10:,} are free" in str(caught.value)
            (run / "ballast").unlink()
            refused += 1
        assert refused == 8
        save(run, 21)
        assert latest(run)[0].step == 21


def test_a_save_that_cannot_fit_writes_nothing(tmp_path: Path) -> None:
    disk, room = tmp_path / "disk", 20 << 10
    with small_disk(disk, 256 << 10):
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
        (disk / "ballast").write_bytes(bytes(free - room))
        (disk / "checkpoints").touch()  # would be an error if the save began
        with pytest.raises(ResourceError, match=f"No space left.* and {room:,} are free"):
            save(disk, 7)
        (disk / "ballast").unlink()
        with pytest.raises(ResourceError, match=r"File exists|Not a directory"):
            save(disk, 7)


def test_a_read_only_directory_is_an_error(saved: Path, tmp_path: Path) -> None:
    """Root can write anywhere except on a read-only disk."""
    with contextlib.ExitStack() as stack:
        if os.geteuid():
            run = shutil.copytree(saved, tmp_path / "run")
            (run / "checkpoints").chmod(0o500)
            stack.callback((run / "checkpoints").chmod, 0o700)
        else:
            disk = tmp_path / "disk"
            stack.enter_context(small_disk(disk, 256 << 10))
            run = shutil.copytree(saved, disk / "run")
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(ResourceError, match=r"Read-only file system|Permission") as caught:
            save(run, 21)
        assert_refused(run, str(caught.value))
