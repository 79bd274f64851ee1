"""Saving and loading one checkpoint, and detection of damaged ones."""

import errno
import itertools
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind.errors import CheckpointError
from minimind.training.checkpoint import (
    damaged_checkpoints,
    inspect_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from minimind.training.rng import rng_states, set_rng_states
from tests.support.checkpoints import assert_intact, latest, names, save
from tests.support.small_runs import ForkServer, nano_trainer, tensors

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A writable copy of `saved`."""
    return shutil.copytree(saved, tmp_path / "run")


def test_a_checkpoint_survives_a_round_trip(tmp_path: Path) -> None:
    kinds = {
        "half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "one": torch.tensor(3.5),
        "none": torch.zeros(0, 4),
        "random": torch.get_rng_state(),
    }
    state = {"nothing": None, "small": 5e-324, "third": 1 / 3, "text": "长江\n", "list": [1, {}]}
    path = save_checkpoint(tmp_path, 3, model=kinds, optimizer={}, state=state, keep=1)
    assert path == tmp_path / "checkpoints" / "step-00000003"
    checkpoint, warnings = latest(tmp_path)
    assert (checkpoint.step, checkpoint.path, checkpoint.optimizer) == (3, path, {})
    assert checkpoint.state == state
    assert not warnings
    assert all(torch.equal(checkpoint.model[name], kinds[name]) for name in kinds)
    assert all(checkpoint.model[name].dtype == kinds[name].dtype for name in kinds)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)


def test_a_run_without_checkpoints_has_no_latest_one(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path, warn=pytest.fail) is None
    (tmp_path / "checkpoints" / ".tmp-00000007").mkdir(parents=True)
    assert latest_checkpoint(tmp_path, warn=pytest.fail) is None


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 99_999_999, 100_000_000):  # by number, not by name
        save(tmp_path, step, keep=3)
    assert names(tmp_path) == ["step-00000010", "step-100000000", "step-99999999"]
    assert latest(tmp_path)[0].step == 100_000_000
    save(tmp_path, 100_000_001, keep=1)
    assert names(tmp_path) == ["step-100000001"]


def test_the_best_checkpoint_is_kept_until_there_is_a_better_one(tmp_path: Path) -> None:
    kept = [(3, 3, "3"), (6, 3, "3 6"), (9, 3, "3 9"), (12, 12, "12"), (15, 12, "12 15")]
    kept += [(18, 15, "15 18"), (21, None, "21")]
    for step, best, left in kept:
        save(tmp_path, step, keep=1, best=best)
        assert names(tmp_path) == [f"step-{int(number):08}" for number in left.split()]


def test_a_save_removes_temporary_directories_of_killed_saves(run: Path) -> None:
    for left in (".tmp-00000021", ".tmp-step-00000007"):
        (run / "checkpoints" / left).mkdir()
        (run / "checkpoints" / left / "model.safetensors").write_bytes(b"half")
    save(run, 21)
    assert names(run) == ["step-00000014", "step-00000021"]


# Every kind of damage is detected and reported, and the previous checkpoint is loaded.


def assert_skips(run: Path, damaged: int = 14, valid: int = 7) -> str:
    """Check that the valid checkpoint is loaded. Returns the warning about the damaged one."""
    checkpoint, warnings = latest(run)
    assert checkpoint.step == valid
    assert_intact(checkpoint)
    assert len(warnings) == 1
    assert str(run / "checkpoints" / f"step-{damaged:08}") in warnings[0]
    assert "is damaged and skipped" in warnings[0]
    return warnings[0]


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_detected(run: Path, name: str) -> None:
    path = run / "checkpoints" / "step-00000014" / name
    content = path.read_bytes()
    steps = range(0, len(content), 4096)
    odd = (1, 7, 8, 9, len(content) // 2, len(content) - 4, len(content) - 1)
    for size in sorted({*steps, *odd}):
        path.write_bytes(content[:size])
        assert name in assert_skips(run)
    path.write_bytes(content)
    assert latest(run)[0].step == 14


def test_every_flipped_bit_is_detected(run: Path) -> None:
    """Flip 50 bits in each file; the small files are nearly covered."""
    dice = random.Random(4)
    for name in FILES:
        path = run / "checkpoints" / "step-00000014" / name
        content = path.read_bytes()
        for bit in dice.sample(range(8 * len(content)), 50):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            assert_skips(run)
        path.write_bytes(content)
    assert latest(run)[0].step == 14


def test_a_flipped_bit_anywhere_in_the_manifest_is_detected(run: Path) -> None:
    path = run / "checkpoints" / "step-00000014" / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        assert "manifest.json" in assert_skips(run)


@pytest.mark.parametrize("content", ["", "[]", "null", "5", '{"files": []}', "[" * 100_000])
def test_a_manifest_with_other_content_is_detected(run: Path, content: str) -> None:
    (run / "checkpoints" / "step-00000014" / "manifest.json").write_text(content)
    assert "manifest.json" in assert_skips(run)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_detected(run: Path, name: str) -> None:
    path = run / "checkpoints" / "step-00000014"
    (path / name).unlink()
    assert assert_skips(run).endswith(
        f": {name}: missing. The next save renames it to .damaged-step-00000014"
    )


STRAY = (".DS_Store", "._model.safetensors", ".nfs0000000012", "Thumbs.db", "desktop.ini", ".x")


@pytest.mark.parametrize("name", STRAY)
def test_files_of_file_managers_and_network_disks_are_ignored(run: Path, name: str) -> None:
    path = run / "checkpoints" / "step-00000014"
    for folder in (path, run / "checkpoints"):
        (folder / name).write_bytes(b"\0\0\0\1Bud1")
    checkpoint, warnings = latest(run)
    assert (checkpoint.step, warnings) == (14, [])
    assert_intact(checkpoint)
    assert [one.error for one in inspect_checkpoints(run, verify_hashes=True)] == ["", ""]
    save(run, 21)
    assert [name for name in names(run) if name[:4] == "step"] == ["step-00000014", "step-00000021"]
    assert (path / name).is_file()


def test_an_unknown_file_is_reported_but_is_no_damage(run: Path) -> None:
    path = run / "checkpoints" / "step-00000014"
    (path / "more.json").write_text("{}")
    (path / "notes").mkdir()
    checkpoint, warnings = latest(run)
    assert checkpoint.step == 14
    assert warnings == [f"{path}: more.json, notes does not belong to a checkpoint and is not used"]
    unknown = [(one.unknown, one.error) for one in inspect_checkpoints(run, verify_hashes=False)]
    assert unknown == [((), ""), (("more.json", "notes"), "")]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("name", FILES)
def test_a_temporarily_unreadable_file_is_no_damage(
    run: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    real, warnings = Path.open, []
    unreadable = run / "checkpoints" / "step-00000014" / name

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == unreadable:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        with pytest.raises(CheckpointError) as caught:
            latest_checkpoint(run, warn=warnings.append)
        errors = [one.error for one in inspect_checkpoints(run, verify_hashes=True)]
        with pytest.raises(CheckpointError, match=os.strerror(number)):
            load_checkpoint(run, 14)
    message = f"{unreadable.parent} cannot be read: [Errno {number}] {os.strerror(number)}"
    assert str(caught.value).startswith(message)
    assert "Run the same command again" in str(caught.value) and warnings == []
    assert errors[0] == "" and errors[1].startswith(message)
    assert latest(run)[0].step == 14


def test_an_unreadable_directory_of_checkpoints_is_not_treated_as_empty(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match=r"checkpoints cannot be read: .*Permission denied"):
        latest_checkpoint(run, warn=pytest.fail)


@pytest.mark.parametrize(("one", "other"), [*itertools.combinations(FILES, 2)])
def test_swapped_files_are_detected(run: Path, one: str, other: str) -> None:
    path = run / "checkpoints" / "step-00000014"
    (path / one).rename(path / "between")
    (path / other).rename(path / one)
    (path / "between").rename(path / other)
    assert_skips(run)


@pytest.mark.parametrize("name", FILES)
def test_files_of_another_checkpoint_are_detected(run: Path, name: str) -> None:
    checkpoints = run / "checkpoints"
    shutil.copy(checkpoints / "step-00000007" / name, checkpoints / "step-00000014" / name)
    assert_skips(run)


def test_a_renamed_checkpoint_is_detected(run: Path) -> None:
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "step-00000014", checkpoints / "step-00000021")
    assert_skips(run, damaged=21, valid=14)


def test_a_file_or_an_empty_directory_is_damaged(run: Path) -> None:
    path = run / "checkpoints" / "step-00000021"
    path.mkdir()
    assert_skips(run, damaged=21, valid=14)
    path.rmdir()
    path.write_text("")
    assert_skips(run, damaged=21, valid=14)


def test_a_run_with_only_damaged_checkpoints_cannot_resume(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        (path / "model.safetensors").write_bytes(b"")
    warnings: list[str] = []
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged.*--fresh"):
        latest_checkpoint(run, warn=warnings.append)
    assert len(warnings) == 2


def damaged_names(run: Path) -> list[str]:
    return [path.name for path in damaged_checkpoints(run)]


def test_a_damaged_checkpoint_is_quarantined_and_never_deleted(run: Path) -> None:
    checkpoints = run / "checkpoints"
    damaged = checkpoints / "step-00000014"
    (damaged / "state.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in damaged.iterdir()}
    save(run, 9, keep=1)  # the run was resumed from 7 and stopped at 9
    assert (names(run), damaged_names(run)) == (["step-00000009"], [".damaged-step-00000014"])
    quarantined = checkpoints / ".damaged-step-00000014"
    assert {file.name: file.read_bytes() for file in quarantined.iterdir()} == before
    shutil.copytree(checkpoints / "step-00000009", damaged)
    save(run, 14)
    assert names(run) == ["step-00000009", "step-00000014"]
    assert damaged_names(run) == [".damaged-step-00000014", ".damaged-step-00000014-2"]
    checkpoint, warnings = latest(run)
    assert (checkpoint.step, warnings) == (14, [])
    assert_intact(checkpoint)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"model__num_hidden_layers": 1}, "its weights belong to a model of another shape"),
        ({"model__intermediate_size": 192}, "its weights belong to a model of another shape"),
        ({"optim__name": "adamw"}, "the optimizer's state belongs to another model or optimizer"),
    ],
)
def test_a_checkpoint_of_another_model_or_optimizer_is_refused(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    nano_trainer(tmp_path, training__steps=2).train()
    with pytest.raises(CheckpointError) as caught:
        nano_trainer(tmp_path, training__steps=2, **other).train()
    assert str(caught.value).startswith(f"{tmp_path / 'checkpoints' / 'step-00000002'}: {message}")
    assert "choose another --out, or start over with --fresh" in str(caught.value)


class FakeGenerator:
    """The random generator of an Apple GPU, as torch.mps exposes it."""

    def __init__(self) -> None:
        self.state = torch.arange(4, dtype=torch.uint8)

    def get_rng_state(self) -> torch.Tensor:
        return self.state.clone()

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.state = state.clone()


def test_the_rng_of_an_apple_gpu_is_saved_and_restored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
    assert not torch.equal(fake.state, before), "ignored on another device"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resuming_needs_memory_for_only_one_more_tensor(
    tmp_path: Path, fork_server: ForkServer
) -> None:
    """Load 256 MiB, in tensors of 4 MiB, into a process that already holds 256 MiB.

    Mapped pages of the file count too; how many the kernel maps at a time differs.
    """
    save_checkpoint(
        tmp_path,
        5,
        model={f"layers.{n}": torch.full((1 << 20,), float(n)) for n in range(32)},
        optimizer={f"m/{n}": torch.full((1 << 20,), 2.0 * n) for n in range(32)},
        state={},
        keep=1,
    )
    assert fork_server.run("restore", run=tmp_path) == 0, fork_server.output.read_text()
    assert int(fork_server.output.read_text()) <= 32 << 20


def test_the_state_is_a_json_file(run: Path) -> None:
    state = (run / "checkpoints" / "step-00000014" / "state.json").read_text("utf-8")
    assert json.loads(state) == tensors(14, 1)["state"]
