"""Atomic, checksummed checkpoints.

    checkpoints/step-00001000/model.safetensors      trained weights
                              optimizer.safetensors  optimizer moments and random states
                              state.json             progress of the run
                              manifest.json          size and SHA-256 of each file; written last

A checkpoint is written to a temporary directory, flushed to the disk, then renamed, so that it is
complete or absent. Loading verifies every byte. A damaged checkpoint is skipped with a warning; the
next save renames it to `.damaged-step-…`, and nothing deletes it.

`checkpoint_writer.py` writes them in a background thread while training continues.
"""

import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minimind.errors import CheckpointError, ResourceError, same_command
from minimind.files import fsync, read_json
from minimind.model.saving import is_stray
from minimind.training.run import (
    checkpoint_paths,
    checkpoints_folder,
    step_of,
    unreadable_checkpoint,
)

_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_MANIFEST = "manifest.json"
_TMP_PREFIX = ".tmp-"
_DAMAGED_PREFIX = ".damaged-"
DECAYED_PREFIX = ".decayed-"  # of checkpoints that an extended run has left behind


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read from the disk when it is accessed."""

    def __init__(self, path: Path, names: Collection[str] | None = None) -> None:
        """Open a file. names: the tensors to include; None means all."""
        self._path = path
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        self.shapes = {n: s for n, s in shapes.items() if names is None or n in names}

    def select(self, wanted: Callable[[str], bool]) -> "TensorFile":
        """Return a view of the tensors whose names `wanted` accepts."""
        return TensorFile(self._path, [name for name in self.shapes if wanted(name)])

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        with safe_open(self._path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint after `step` optimizer steps. Tensors are read on access."""

    step: int
    path: Path
    model: TensorFile
    optimizer: TensorFile
    state: dict[str, Any]


def save_checkpoint(
    run: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
    best: int | None = None,
    protect: Collection[int] = (),
) -> Path:
    """Write the checkpoint of `step` and return its path.

    The newest `keep` checkpoints are kept, and those of step `best` and the steps in `protect`;
    others are deleted. Checkpoints of this and later steps were skipped as damaged on resume; they
    are renamed. Raises ResourceError if the checkpoint cannot be written; older ones are unchanged
    then.
    """
    folder = checkpoints_folder(run)
    path = folder / f"step-{step:08}"
    num_bytes = sum(t.numel() * t.element_size() for t in (*model.values(), *optimizer.values()))
    try:
        _remove_temporary(folder)  # left by a process that was killed while saving
        disk = shutil.disk_usage(run)
        if disk.free < num_bytes and disk.total:  # some network disks report only zeros
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # Network disks keep .nfs files of removed directories, so the name may be taken.
        temporary = _unused_path(folder / f"{_TMP_PREFIX}{step:08}")
        temporary.mkdir(parents=True)
        _write_files(temporary, step, model, optimizer, state)
        if path.exists():
            set_aside(path)
        os.replace(temporary, path)
        fsync(folder)
        for later in [other for other in checkpoint_paths(run) if step_of(other) > step]:
            set_aside(later)
        _prune(run, keep, {best, *protect})
    except (OSError, SafetensorError) as error:
        _remove_temporary(folder)
        free = shutil.disk_usage(run).free
        raise ResourceError(
            f"{path}: the checkpoint could not be written ({error}); it needs {num_bytes:,} bytes "
            f"and {free:,} are free. Older checkpoints are intact. Free some space and run "
            f"{same_command()} again"
        ) from error
    _remove_temporary(folder)
    return path


def _write_files(
    folder: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Write the files of a checkpoint and flush them, the manifest last."""
    for name, tensors in zip(_FILES, (model, optimizer), strict=False):
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        safetensors.torch.save_file(contiguous, folder / name)
        del contiguous  # free the copies before those of the next file are made
    (folder / "state.json").write_text(json.dumps(dict(state)), encoding="utf-8")
    for name in _FILES:
        fsync(folder / name)
    entries = {name: _manifest_entry(folder / name) for name in _FILES}
    (folder / _MANIFEST).write_text(_manifest_text(step, entries), encoding="utf-8")
    fsync(folder / _MANIFEST)
    fsync(folder)


def _prune(run: Path, keep: int, protected: Collection[int | None]) -> None:
    """Mark checkpoints for removal, except the newest `keep` and the protected ones.

    They are renamed first, which is atomic: a process killed while deleting leaves no partial
    checkpoint.
    """
    for old in checkpoint_paths(run)[keep:]:
        if step_of(old) not in protected:
            os.replace(old, old.with_name(f"{_TMP_PREFIX}{old.name}"))


def _remove_temporary(folder: Path) -> None:
    """Delete checkpoints that are incomplete or marked for removal."""
    for path in folder.glob(f"{_TMP_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside(path: Path, prefix: str = _DAMAGED_PREFIX) -> None:
    """Rename a checkpoint so that no run resumes from it. Its files are kept."""
    os.replace(path, _unused_path(path.with_name(f"{prefix}{path.name}")))


def _unused_path(path: Path) -> Path:
    """Return the path, or the first of path-2, path-3, … that does not exist."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    candidates = itertools.chain([path], numbered)
    return next(candidate for candidate in candidates if not candidate.exists())


def latest_checkpoint(run: Path, *, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest valid checkpoint, or None if none was ever saved.

    warn: called with a line for each damaged checkpoint that is skipped. Raises CheckpointError if
    all are damaged, or if one cannot be read at the moment.
    """
    paths = checkpoint_paths(run)
    for path in paths:
        try:
            return _load(path, warn)
        except _DamageError as damage:
            warn(
                f"{path} is damaged and skipped: {damage}. The next save renames it to "
                f"{_DAMAGED_PREFIX}{path.name}"
            )
    if paths:
        raise CheckpointError(
            f"{run}: every checkpoint is damaged, so the run cannot be resumed. "
            "Restore one from a backup, or start over with --fresh"
        )
    return None


def load_checkpoint(run: Path, step: int) -> Checkpoint:
    """Return the checkpoint of a step. Raises CheckpointError if it is damaged or missing."""
    path = checkpoints_folder(run) / f"step-{step:08}"
    try:
        return _load(path, lambda warning: None)
    except _DamageError as damage:
        raise CheckpointError(f"{path} is damaged: {damage}") from damage


def restore_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into the trained tensors of `model`, one at a time.

    Raises CheckpointError if names or shapes differ.
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    own = {name: t for name, t in model.state_dict().items() if name not in frozen}
    if checkpoint.model.shapes != {name: tuple(tensor.shape) for name, tensor in own.items()}:
        raise CheckpointError(
            f"{checkpoint.path}: its weights belong to a model of another shape than the one this "
            "run trains now. Restore the model that the run began with, choose another --out, or "
            "start over with --fresh"
        )
    for name, tensor in own.items():
        tensor.copy_(checkpoint.model[name])


@dataclass(frozen=True)
class CheckpointInfo:
    """Description of a checkpoint on the disk, valid or not."""

    step: int
    path: Path
    saved: datetime | None  # None if the system cannot read it
    bytes: int
    state: dict[str, Any]  # empty if there is an error
    error: str  # empty if the checkpoint is valid
    unknown: tuple[str, ...] = ()  # names of files that do not belong to a checkpoint


def inspect_checkpoints(run: Path, *, verify_hashes: bool) -> list[CheckpointInfo]:
    """Describe the checkpoints of a run, oldest first.

    verify_hashes: verify the hash of every file; otherwise only file sizes and state.json.
    """
    infos = []
    for path in reversed(checkpoint_paths(run)):
        error_text, saved, size, state, unknown = "", None, 0, {}, []
        try:
            saved = datetime.fromtimestamp(path.stat().st_mtime).astimezone()
            if path.is_dir():
                size = sum(file.stat().st_size for file in path.iterdir())
            _verify(path, verify_hashes)
            unknown = _unknown_files(path)
            state = read_json(path / "state.json")
        except FileNotFoundError:  # the training process has just pruned it
            continue
        except (_DamageError, CheckpointError, OSError) as error:
            error_text = str(error)
        info = CheckpointInfo(step_of(path), path, saved, size, state, error_text, tuple(unknown))
        infos.append(info)
    return infos


def damaged_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints that were set aside as damaged."""
    return sorted(checkpoints_folder(run).glob(f"{_DAMAGED_PREFIX}step-*"))


def decayed_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints that were set aside when the run was extended."""
    return sorted(checkpoints_folder(run).glob(f"{DECAYED_PREFIX}step-*"))


def newest_state(run: Path) -> dict[str, Any] | None:
    """Return the state of the newest checkpoint that looks complete, or None."""
    infos = inspect_checkpoints(run, verify_hashes=False)
    return next((info.state for info in reversed(infos) if not info.error), None)


def best_step(infos: Sequence[CheckpointInfo]) -> int | None:
    """Return the step of the best validation, as the newest readable checkpoint records it."""
    records = (info.state.get("best") for info in reversed(infos))
    return next((int(best["step"]) for best in records if best), None)


class _DamageError(Exception):
    """Error for a checkpoint that is incomplete, or whose bytes differ from those saved."""


def _load(path: Path, warn: Callable[[str], None]) -> Checkpoint:
    """Verify and open a checkpoint.

    Raises _DamageError if it is damaged or a file is missing, and CheckpointError if the system
    cannot read it now.
    """
    try:
        _verify(path, verify_hashes=True)
        if unknown := _unknown_files(path):
            warn(f"{path}: {', '.join(unknown)} does not belong to a checkpoint and is not used")
        model, optimizer = (TensorFile(path / name) for name in _FILES[:2])
        return Checkpoint(step_of(path), path, model, optimizer, read_json(path / "state.json"))
    except FileNotFoundError as error:
        raise _DamageError(str(error)) from error
    except (OSError, SafetensorError) as error:
        raise unreadable_checkpoint(path, error) from error


def _verify(path: Path, verify_hashes: bool) -> None:
    """Compare a checkpoint with its manifest: every hash, or only sizes and state.json.

    Raises _DamageError; FileNotFoundError if the checkpoint is gone; CheckpointError if the system
    cannot read it now (too many open files, no permission, disk error).
    """
    try:
        if missing := sorted({*_FILES, _MANIFEST} - {file.name for file in path.iterdir()}):
            raise _DamageError(f"{', '.join(missing)}: missing")
        if verify_hashes:
            _verify_manifest(path)
            return
        entries = json.loads((path / _MANIFEST).read_bytes())["files"]
        if entries["state.json"] != _manifest_entry(path / "state.json"):
            raise _DamageError(f"{_MANIFEST} does not describe state.json")
        for name in _FILES:
            if (path / name).stat().st_size != entries[name]["bytes"]:
                raise _DamageError(f"the size of {name} is not that in {_MANIFEST}")
    except FileNotFoundError:
        raise
    except (NotADirectoryError, IsADirectoryError) as error:
        raise _DamageError(str(error)) from error
    except OSError as error:
        raise unreadable_checkpoint(path, error) from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _DamageError(f"{_MANIFEST} cannot be used: {error}") from error


def _verify_manifest(path: Path) -> None:
    """Compare the manifest, byte by byte, with the one that these files would have."""
    entries = {name: _manifest_entry(path / name) for name in _FILES}
    manifest = (path / _MANIFEST).read_bytes()
    if manifest != _manifest_text(step_of(path), entries).encode():
        wrong = [name for name in _FILES if str(entries[name]["sha256"]).encode() not in manifest]
        raise _DamageError(f"{_MANIFEST} does not describe {', '.join(wrong) or path.name}")


def _unknown_files(path: Path) -> list[str]:
    """List the files that are neither part of a checkpoint nor stray (`is_stray`)."""
    if not path.is_dir():
        return []
    names = {file.name for file in path.iterdir()} - {*_FILES, _MANIFEST}
    return sorted(name for name in names if not is_stray(name))


def _manifest_entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _manifest_text(step: int, entries: Mapping[str, Any]) -> str:
    return json.dumps({"step": step, "files": entries}, indent=1, sort_keys=True) + "\n"
