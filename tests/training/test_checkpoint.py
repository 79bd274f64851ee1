"""Rows 1, 4 and 5 of the reliability promises, as far as one save or one load goes."""

import contextlib
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_runs import REFUSED, Lives, tensors

from minimind.errors import CheckpointError, ResourceError
from minimind.training.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
NUMBERS = 3000  # in each of the two tensors: 12 kB a file
BYTES = 24_000


def save(run: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(run, step, keep=keep, **tensors(step, NUMBERS))


def latest(run: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that is whole, and what was said of the others."""
    said: list[str] = []
    checkpoint = latest_checkpoint(run, warn=said.append)
    assert checkpoint is not None
    return checkpoint, said


def assert_whole(checkpoint: Checkpoint) -> None:
    saved = tensors(checkpoint.step, NUMBERS)
    assert checkpoint.path.name == f"step-{checkpoint.step:08}"
    assert checkpoint.state == saved["state"]
    for found, wanted in [
        (checkpoint.model, saved["model"]),
        (checkpoint.optimizer, saved["optimizer"]),
    ]:
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of the steps 7 and 14; not to be written to."""
    run = tmp_path_factory.mktemp("saved")
    save(run, 7)
    save(run, 14)
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(saved, tmp_path / "run")


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    kinds = {
        "half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "one": torch.tensor(3.5),
        "none": torch.zeros(0, 4),
        "random": torch.get_rng_state(),
    }
    state = {"nothing": None, "small": 5e-324, "third": 1 / 3, "words": "长江\n", "list": [1, {}]}
    path = save_checkpoint(tmp_path, 3, model=kinds, optimizer={}, state=state, keep=1)
    assert path == tmp_path / "checkpoints" / "step-00000003"
    checkpoint, said = latest(tmp_path)
    assert (checkpoint.step, checkpoint.path, checkpoint.optimizer) == (3, path, {})
    assert checkpoint.state == state
    assert not said
    assert all(torch.equal(checkpoint.model[name], kinds[name]) for name in kinds)
    assert all(checkpoint.model[name].dtype == kinds[name].dtype for name in kinds)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path, warn=pytest.fail) is None
    (tmp_path / "checkpoints" / ".making-00000007").mkdir(parents=True)
    assert latest_checkpoint(tmp_path, warn=pytest.fail) is None


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 99_999_999, 100_000_000):  # by number, not by name
        save(tmp_path, step, keep=3)
    assert names(tmp_path) == ["step-00000010", "step-100000000", "step-99999999"]
    assert latest(tmp_path)[0].step == 100_000_000
    save(tmp_path, 100_000_001, keep=1)
    assert names(tmp_path) == ["step-100000001"]


def test_what_killed_saves_left_is_removed_by_the_next(run: Path) -> None:
    for left in (".making-00000021", ".making-old-step-00000007", ".making-00000014.damaged"):
        (run / "checkpoints" / left).mkdir()
        (run / "checkpoints" / left / "model.safetensors").write_bytes(b"half")
    save(run, 21)
    assert names(run) == ["step-00000014", "step-00000021"]


# Row 4: whatever is wrong with a checkpoint is noticed and named, and the one before is taken.


def passes_over(run: Path, damaged: int = 14, good: int = 7) -> str:
    """Check that the good checkpoint is taken; what is said of the other."""
    checkpoint, said = latest(run)
    assert checkpoint.step == good
    assert_whole(checkpoint)
    assert len(said) == 1
    assert str(run / "checkpoints" / f"step-{damaged:08}") in said[0]
    assert "damaged and passed over" in said[0]
    return said[0]


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_noticed(run: Path, name: str) -> None:
    path = run / "checkpoints" / "step-00000014" / name
    content = path.read_bytes()
    steps = range(0, len(content), 4096)
    odd = (1, 7, 8, 9, len(content) // 2, len(content) - 4, len(content) - 1)
    for size in sorted({*steps, *odd}):
        path.write_bytes(content[:size])
        assert name in passes_over(run)
    path.write_bytes(content)
    assert latest(run)[0].step == 14


def test_every_flipped_bit_is_noticed(run: Path) -> None:
    """200 bits: 50 in each file, which for the small ones is nearly everywhere."""
    dice = random.Random(4)
    for name in FILES:
        path = run / "checkpoints" / "step-00000014" / name
        content = path.read_bytes()
        for bit in dice.sample(range(8 * len(content)), 50):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            passes_over(run)
        path.write_bytes(content)
    assert latest(run)[0].step == 14


def test_every_bit_of_the_manifest_counts(run: Path) -> None:
    path = run / "checkpoints" / "step-00000014" / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        assert "manifest.json" in passes_over(run)


@pytest.mark.parametrize("content", ["", "[]", "null", "5", '{"files": []}', "[" * 100_000])
def test_a_manifest_of_something_else_is_noticed(run: Path, content: str) -> None:
    (run / "checkpoints" / "step-00000014" / "manifest.json").write_text(content)
    assert "manifest.json" in passes_over(run)


@pytest.mark.parametrize("name", FILES)
def test_missing_and_extra_files_are_noticed(run: Path, name: str) -> None:
    place = run / "checkpoints" / "step-00000014"
    (place / name).rename(place / f"{name}.old")
    assert name in passes_over(run)
    (place / f"{name}.old").rename(place / name)
    assert latest(run)[0].step == 14
    (place / "more.json").write_text("{}")
    assert "more.json" in passes_over(run)


@pytest.mark.parametrize(("one", "other"), [*itertools.combinations(FILES, 2)])
def test_swapped_files_are_noticed(run: Path, one: str, other: str) -> None:
    place = run / "checkpoints" / "step-00000014"
    (place / one).rename(place / "between")
    (place / other).rename(place / one)
    (place / "between").rename(place / other)
    passes_over(run)


@pytest.mark.parametrize("name", FILES)
def test_files_of_another_checkpoint_are_noticed(run: Path, name: str) -> None:
    home = run / "checkpoints"
    shutil.copy(home / "step-00000007" / name, home / "step-00000014" / name)
    passes_over(run)


def test_a_checkpoint_under_another_name_is_noticed(run: Path) -> None:
    home = run / "checkpoints"
    shutil.copytree(home / "step-00000014", home / "step-00000021")
    passes_over(run, damaged=21, good=14)


def test_a_file_or_an_empty_folder_is_no_checkpoint(run: Path) -> None:
    place = run / "checkpoints" / "step-00000021"
    place.mkdir()
    passes_over(run, damaged=21, good=14)
    place.rmdir()
    place.write_text("")
    passes_over(run, damaged=21, good=14)


def test_when_all_are_damaged_the_run_cannot_go_on(run: Path) -> None:
    for place in (run / "checkpoints").iterdir():
        (place / "model.safetensors").write_bytes(b"")
    said: list[str] = []
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole.*--fresh"):
        latest_checkpoint(run, warn=said.append)
    assert len(said) == 2


def test_a_damaged_checkpoint_is_replaced_and_never_kept_for_a_good_one(run: Path) -> None:
    damaged = run / "checkpoints" / "step-00000014"
    (damaged / "state.json").write_text("{}")
    save(run, 9, keep=1)  # the run went on from 7 and was stopped at 9
    assert names(run) == ["step-00000009"]
    shutil.copytree(run / "checkpoints" / "step-00000009", damaged)
    save(run, 14)
    assert names(run) == ["step-00000009", "step-00000014"]
    checkpoint, said = latest(run)
    assert (checkpoint.step, said) == (14, [])
    assert_whole(checkpoint)


# Row 1: killed at every write, flush, rename and removal of one save.


@pytest.mark.parametrize("replaces", [False, True])
def test_a_kill_anywhere_leaves_the_old_or_the_new_one_whole(
    saved: Path, tmp_path: Path, lives: Lives, replaces: bool
) -> None:
    """`replaces`: a damaged one of the same step is in the way."""
    found = []
    for point in itertools.count():
        run = shutil.copytree(saved, tmp_path / f"{point}")
        if replaces:
            shutil.copytree(
                run / "checkpoints" / "step-00000014", run / "checkpoints/step-00000021"
            )
        status = lives.run("save", run=run, step=21, numbers=NUMBERS, keep=2, point=point)
        if status == 0:
            break
        assert status == -signal.SIGKILL, lives.output.read_text()
        checkpoint, said = latest(run)
        assert_whole(checkpoint)
        found.append(checkpoint.step)
        assert len(said) == int(replaces and "step-00000021" in names(run) and found[-1] == 14)
        save(run, checkpoint.step + 7)
        assert names(run) == [f"step-{step:08}" for step in (checkpoint.step, checkpoint.step + 7)]
        shutil.rmtree(run)
    assert len(found) >= 30
    assert set(found) == {14, 21}
    assert found == sorted(found), "once the new one is there, it stays"


# Row 5: the disk is full, anywhere.


def assert_refused(run: Path, message: str) -> None:
    """The save has failed with all that a user needs, and left nothing behind."""
    assert f"it needs {BYTES:,} bytes" in message
    assert "are free" in message and "Older checkpoints are whole" in message
    assert names(run) == ["step-00000007", "step-00000014"]
    checkpoint, said = latest(run)
    assert (checkpoint.step, said) == (14, [])
    assert_whole(checkpoint)


def test_a_full_disk_anywhere_leaves_the_older_ones_whole(
    saved: Path, tmp_path: Path, lives: Lives
) -> None:
    refused = 0
    for point in itertools.count():
        run = shutil.copytree(saved, tmp_path / f"{point}")
        options = {"step": 21, "numbers": NUMBERS, "keep": 2, "how": "full"}
        status = lives.run("save", run=run, point=point, **options)
        message = lives.output.read_text()
        assert status in (0, REFUSED), message
        if names(run) == ["step-00000014", "step-00000021"] and status == 0:
            break  # there are no more points
        new, said = latest(run)
        assert not said
        assert_whole(new)
        if new.step == 14:
            assert status == REFUSED, message
            assert_refused(run, message)
            refused += 1
        save(run, 28)
        assert names(run)[1:] == ["step-00000028"]
        shutil.rmtree(run)
    assert refused >= 20


def test_files_that_may_not_grow_further(saved: Path, tmp_path: Path, lives: Lives) -> None:
    """The system itself refuses the write: first the manifest's, then the tensors'."""
    for limit in [*range(0, 12_000, 600), 12_050]:
        run = shutil.copytree(saved, tmp_path / f"{limit}")
        options = {"step": 21, "numbers": NUMBERS, "keep": 2, "how": "limit"}
        assert lives.run("save", run=run, point=limit, **options) == REFUSED
        assert_refused(run, lives.output.read_text())
    assert lives.run("save", run=run, point=13_000, **options) == 0


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount).returncode:
        pytest.skip("a disk of a certain size needs a mount, which needs rights")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_real_small_disk(tmp_path: Path) -> None:
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


def test_a_folder_that_cannot_be_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The superuser may write anywhere, and runs many checks: the system's answer is made up."""

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(os, "mkdir", refuse)
        with pytest.raises(ResourceError, match="Read-only file system") as caught:
            save(run, 21)
    assert_refused(run, str(caught.value))


def test_the_state_is_plain_json(run: Path) -> None:
    state = (run / "checkpoints" / "step-00000014" / "state.json").read_text("utf-8")
    assert json.loads(state) == tensors(14, 1)["state"]
