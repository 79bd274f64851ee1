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
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind.errors import CheckpointError, ResourceError
from minimind.training.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    damaged_checkpoints,
    inspect_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from minimind.training.rng import rng_states, set_rng_states
from tests.support.small_runs import REFUSED, Lives, nano_trainer, tensors

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
NUMBERS = 3000  # in each of the two tensors: 12 kB a file
BYTES = 24_000


def save(run: Path, step: int, keep: int = 2, best: int | None = None) -> Path:
    return save_checkpoint(run, step, keep=keep, best=best, **tensors(step, NUMBERS))


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
    """Everything in the folder of checkpoints but what was set aside."""
    there = sorted(path.name for path in (run / "checkpoints").iterdir())
    return [name for name in there if not name.startswith(".damaged-")]


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


def test_the_best_is_kept_until_there_is_a_better_one(tmp_path: Path) -> None:
    kept = [(3, 3, "3"), (6, 3, "3 6"), (9, 3, "3 9"), (12, 12, "12"), (15, 12, "12 15")]
    kept += [(18, 15, "15 18"), (21, None, "21")]
    for step, best, left in kept:
        save(tmp_path, step, keep=1, best=best)
        assert names(tmp_path) == [f"step-{int(number):08}" for number in left.split()]


def test_what_killed_saves_left_is_removed_by_the_next(run: Path) -> None:
    for left in (".making-00000021", ".making-old-step-00000007"):
        (run / "checkpoints" / left).mkdir()
        (run / "checkpoints" / left / "model.safetensors").write_bytes(b"half")
    save(run, 21)
    assert names(run) == ["step-00000014", "step-00000021"]


# Row 4: whatever is wrong with a checkpoint is noticed and named, and the one before is taken.


def skips(run: Path, damaged: int = 14, good: int = 7) -> str:
    """Check that the good checkpoint is taken; what is said of the other."""
    checkpoint, said = latest(run)
    assert checkpoint.step == good
    assert_whole(checkpoint)
    assert len(said) == 1
    assert str(run / "checkpoints" / f"step-{damaged:08}") in said[0]
    assert "is damaged and skipped" in said[0]
    return said[0]


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_noticed(run: Path, name: str) -> None:
    path = run / "checkpoints" / "step-00000014" / name
    content = path.read_bytes()
    steps = range(0, len(content), 4096)
    odd = (1, 7, 8, 9, len(content) // 2, len(content) - 4, len(content) - 1)
    for size in sorted({*steps, *odd}):
        path.write_bytes(content[:size])
        assert name in skips(run)
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
            skips(run)
        path.write_bytes(content)
    assert latest(run)[0].step == 14


def test_every_bit_of_the_manifest_counts(run: Path) -> None:
    path = run / "checkpoints" / "step-00000014" / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        assert "manifest.json" in skips(run)


@pytest.mark.parametrize("content", ["", "[]", "null", "5", '{"files": []}', "[" * 100_000])
def test_a_manifest_of_something_else_is_noticed(run: Path, content: str) -> None:
    (run / "checkpoints" / "step-00000014" / "manifest.json").write_text(content)
    assert "manifest.json" in skips(run)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed(run: Path, name: str) -> None:
    place = run / "checkpoints" / "step-00000014"
    (place / name).unlink()
    assert skips(run).endswith(
        f": {name}: missing. The next save renames it to .damaged-step-00000014"
    )


STRAY = (".DS_Store", "._model.safetensors", ".nfs0000000012", "Thumbs.db", "desktop.ini", ".x")


@pytest.mark.parametrize("name", STRAY)
def test_files_of_file_managers_and_disks_are_no_damage(run: Path, name: str) -> None:
    place = run / "checkpoints" / "step-00000014"
    for folder in (place, run / "checkpoints"):
        (folder / name).write_bytes(b"\0\0\0\1Bud1")
    checkpoint, said = latest(run)
    assert (checkpoint.step, said) == (14, [])
    assert_whole(checkpoint)
    assert [one.trouble for one in inspect_checkpoints(run, thorough=True)] == ["", ""]
    save(run, 21)
    assert [name for name in names(run) if name[:4] == "step"] == ["step-00000014", "step-00000021"]
    assert (place / name).is_file()


def test_an_unknown_file_is_reported_and_is_no_damage(run: Path) -> None:
    place = run / "checkpoints" / "step-00000014"
    (place / "more.json").write_text("{}")
    (place / "notes").mkdir()
    checkpoint, said = latest(run)
    assert checkpoint.step == 14
    assert said == [f"{place}: more.json, notes does not belong to a checkpoint and is not used"]
    unknown = [(one.unknown, one.trouble) for one in inspect_checkpoints(run, thorough=False)]
    assert unknown == [((), ""), (("more.json", "notes"), "")]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_now_is_no_damage(
    run: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    real, said = Path.open, []
    wanted = run / "checkpoints" / "step-00000014" / name

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == wanted:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        with pytest.raises(CheckpointError) as caught:
            latest_checkpoint(run, warn=said.append)
        trouble = [one.trouble for one in inspect_checkpoints(run, thorough=True)]
        with pytest.raises(CheckpointError, match=os.strerror(number)):
            load_checkpoint(run, 14)
    message = f"{wanted.parent} cannot be read: [Errno {number}] {os.strerror(number)}"
    assert str(caught.value).startswith(message)
    assert "Give the same command again" in str(caught.value) and said == []
    assert trouble[0] == "" and trouble[1].startswith(message)
    assert latest(run)[0].step == 14


def test_a_folder_of_checkpoints_that_cannot_be_listed_is_no_empty_one(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match=r"checkpoints cannot be read: .*Permission denied"):
        latest_checkpoint(run, warn=pytest.fail)


@pytest.mark.parametrize(("one", "other"), [*itertools.combinations(FILES, 2)])
def test_swapped_files_are_noticed(run: Path, one: str, other: str) -> None:
    place = run / "checkpoints" / "step-00000014"
    (place / one).rename(place / "between")
    (place / other).rename(place / one)
    (place / "between").rename(place / other)
    skips(run)


@pytest.mark.parametrize("name", FILES)
def test_files_of_another_checkpoint_are_noticed(run: Path, name: str) -> None:
    home = run / "checkpoints"
    shutil.copy(home / "step-00000007" / name, home / "step-00000014" / name)
    skips(run)


def test_a_checkpoint_under_another_name_is_noticed(run: Path) -> None:
    home = run / "checkpoints"
    shutil.copytree(home / "step-00000014", home / "step-00000021")
    skips(run, damaged=21, good=14)


def test_a_file_or_an_empty_folder_is_no_checkpoint(run: Path) -> None:
    place = run / "checkpoints" / "step-00000021"
    place.mkdir()
    skips(run, damaged=21, good=14)
    place.rmdir()
    place.write_text("")
    skips(run, damaged=21, good=14)


def test_when_all_are_damaged_the_run_cannot_go_on(run: Path) -> None:
    for place in (run / "checkpoints").iterdir():
        (place / "model.safetensors").write_bytes(b"")
    said: list[str] = []
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged.*--fresh"):
        latest_checkpoint(run, warn=said.append)
    assert len(said) == 2


def set_aside(run: Path) -> list[str]:
    return [place.name for place in damaged_checkpoints(run)]


def test_a_damaged_checkpoint_is_set_aside_and_never_deleted(run: Path) -> None:
    home = run / "checkpoints"
    damaged = home / "step-00000014"
    (damaged / "state.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in damaged.iterdir()}
    save(run, 9, keep=1)  # the run was resumed from 7 and stopped at 9
    assert (names(run), set_aside(run)) == (["step-00000009"], [".damaged-step-00000014"])
    aside = home / ".damaged-step-00000014"
    assert {file.name: file.read_bytes() for file in aside.iterdir()} == before
    shutil.copytree(home / "step-00000009", damaged)
    save(run, 14)
    assert names(run) == ["step-00000009", "step-00000014"]
    assert set_aside(run) == [".damaged-step-00000014", ".damaged-step-00000014-2"]
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


@pytest.mark.parametrize("best", [7, 21])
def test_a_kill_anywhere_leaves_a_best_one(
    saved: Path, tmp_path: Path, lives: Lives, best: int
) -> None:
    """The best was 7, and stays so or becomes 21: whichever is the newest, its best is there."""
    found = []
    for point in itertools.count():
        run = shutil.copytree(saved, tmp_path / f"{point}")
        options = {"step": 21, "numbers": NUMBERS, "keep": 1, "best": best}
        status = lives.run("save", run=run, point=point, **options)
        if status == 0:
            break
        checkpoint, said = latest(run)
        assert not said
        found.append(checkpoint.step)
        [wanted] = [
            one
            for one in inspect_checkpoints(run, thorough=True)
            if one.step == (best if checkpoint.step == 21 else 7)
        ]
        assert not wanted.trouble
        shutil.rmtree(run)
    assert set(found) == {14, 21}
    assert names(run) == ([] if best == 21 else ["step-00000007"]) + ["step-00000021"]


# The background: who saves goes on at once, with tensors that may change.


class Gate:
    """Holds a write back until it is opened."""

    def __init__(self) -> None:
        self._open = threading.Event()

    def __call__(self) -> None:
        assert self._open.wait(60)

    def open(self) -> None:
        self._open.set()

    def open_soon(self) -> None:
        threading.Timer(0.1, self.open).start()


def test_what_is_written_is_what_was_there_when_it_was_saved(tmp_path: Path) -> None:
    gate, given = Gate(), tensors(7, NUMBERS)
    with CheckpointWriter(tmp_path, keep=2) as writer:
        writer.save(7, **given, first=gate)
        writer.check()  # which does not wait
        assert not (tmp_path / "checkpoints").exists()
        given["model"]["weight"].zero_()
        given["optimizer"]["moment"].zero_()
        given["state"]["words"] = "other"
        gate.open()
    assert_whole(latest(tmp_path)[0])


def test_one_is_written_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with CheckpointWriter(tmp_path, keep=9) as writer:
        for step in (7, 14, 21):
            gate = Gate()
            writer.save(step, **tensors(step, NUMBERS), first=gate)
            assert names(tmp_path) == [f"step-{s:08}" for s in (7, 14, 21) if s < step]
            gate.open_soon()
    assert names(tmp_path) == ["step-00000007", "step-00000014", "step-00000021"]
    assert latest(tmp_path)[1] == []


@pytest.mark.parametrize("asked", ["check", "save", "wait"])
def test_what_a_write_fails_with_is_raised_where_training_goes_on(
    run: Path, asked: str, monkeypatch: pytest.MonkeyPatch
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
        }[asked]()
    assert_refused(run, str(caught.value))
    writer.save(28, **tensors(28, NUMBERS))
    writer.wait()
    assert latest(run)[0].step == 28


def test_an_error_waits_for_the_write_and_is_not_hidden(tmp_path: Path) -> None:
    gate = Gate()
    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path, keep=2) as writer:
        writer.save(7, **tensors(7, NUMBERS), first=gate)
        gate.open_soon()
        raise ZeroDivisionError
    assert names(tmp_path) == ["step-00000007"]


def test_who_leaves_at_once_does_not_wait(tmp_path: Path) -> None:
    gate = Gate()
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path, keep=2) as writer:
        writer.save(7, **tensors(7, NUMBERS), first=gate)
        raise KeyboardInterrupt
    assert not (tmp_path / "checkpoints").exists()
    gate.open()
    writer.wait()  # so that nothing outlives the test


def test_a_disk_too_full_for_the_metrics_is_told_by_what_a_checkpoint_needs(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with (
        pytest.raises(ResourceError, match="it needs 24,000 bytes"),
        CheckpointWriter(tmp_path, keep=2) as writer,
    ):
        writer.save(7, **tensors(7, NUMBERS))
        raise ResourceError("metrics.jsonl: cannot be written")


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


def test_a_save_that_cannot_fit_is_not_begun(tmp_path: Path) -> None:
    disk, room = tmp_path / "disk", 20 << 10
    with small_disk(disk, 256 << 10):
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
        (disk / "ballast").write_bytes(bytes(free - room))
        (disk / "checkpoints").touch()  # in the way of who would begin
        with pytest.raises(ResourceError, match=f"No space left.* and {room:,} are free"):
            save(disk, 7)
        (disk / "ballast").unlink()
        with pytest.raises(ResourceError, match=r"File exists|Not a directory"):
            save(disk, 7)


def test_a_folder_that_cannot_be_written(saved: Path, tmp_path: Path) -> None:
    """The superuser may write anywhere but on a disk that is read only."""
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


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"model__num_hidden_layers": 1}, "its weights belong to a model of another shape"),
        ({"model__intermediate_size": 192}, "its weights belong to a model of another shape"),
        ({"optim__name": "adamw"}, "the optimizer's state belongs to another model or optimizer"),
    ],
)
def test_a_checkpoint_of_another_model_or_optimizer_is_an_error(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    nano_trainer(tmp_path, training__steps=2).train()
    with pytest.raises(CheckpointError) as caught:
        nano_trainer(tmp_path, training__steps=2, **other).train()
    assert str(caught.value).startswith(f"{tmp_path / 'checkpoints' / 'step-00000002'}: {message}")
    assert "choose another --out, or start over with --fresh" in str(caught.value)


class FakeGenerator:
    """The part of torch.mps that knows the random generator of an Apple GPU."""

    def __init__(self) -> None:
        self.state = torch.arange(4, dtype=torch.uint8)

    def get_rng_state(self) -> torch.Tensor:
        return self.state.clone()

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.state = state.clone()


def test_apples_generator_is_saved_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, mps = FakeGenerator(), torch.device("mps")
    monkeypatch.setattr(torch, "mps", fake)
    states = rng_states(mps)
    assert set(states) == {"rng/cpu", "rng/mps"}
    before = fake.get_rng_state()
    fake.state += 1
    set_rng_states(states, mps)
    assert torch.equal(fake.state, before)
    fake.state += 1
    set_rng_states({"rng/mps": before}, torch.device("cpu"))
    assert not torch.equal(fake.state, before), "a run that was resumed on another device"


RESUME = """
import sys
from pathlib import Path
import torch
from torch import nn
from minimind.training.checkpoint import latest_checkpoint, restore_weights

class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(torch.ones(1 << 20)) for _ in range(32))

model, moments = Held(), {f"m/{n}": torch.ones(1 << 20) for n in range(32)}
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
status = Path("/proc/self/status")

def kilobytes(key):
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if key in line)

before = kilobytes("VmRSS")
checkpoint = latest_checkpoint(Path(sys.argv[1]), warn=print)
restore_weights(model, checkpoint)
for name, tensor in moments.items():
    tensor.copy_(checkpoint.optimizer[name])
assert float(model.layers[31][5]) == 31.0 and float(moments["m/31"][5]) == 62.0
print((kilobytes("VmHWM") - before) << 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count memory in other units")
def test_resuming_takes_one_tensor_more_than_training(tmp_path: Path) -> None:
    """256 MiB of tensors, of 4 MiB each, are read into a process that holds as many."""
    save_checkpoint(
        tmp_path,
        5,
        model={f"layers.{n}": torch.full((1 << 20,), float(n)) for n in range(32)},
        optimizer={f"m/{n}": torch.full((1 << 20,), 2.0 * n) for n in range(32)},
        state={},
        keep=1,
    )
    command = [sys.executable, "-c", RESUME, str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(printed) <= 16 << 20


def test_the_state_is_plain_json(run: Path) -> None:
    state = (run / "checkpoints" / "step-00000014" / "state.json").read_text("utf-8")
    assert json.loads(state) == tensors(14, 1)["state"]
