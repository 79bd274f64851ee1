"""Checkpoints that are whole or not there, and that notice every changed bit.

    checkpoints/step-00001000/model.safetensors      weights that are trained
                              optimizer.safetensors  moments and random states
                              state.json             where the run stood
                              manifest.json          sizes and sha256 sums; written last

All of it is written into a hidden directory beside, flushed to the disk, then renamed: in a thread
of its own, so that training waits for no more than a copy of the tensors in memory.

A damaged checkpoint is renamed to `.damaged-step-…` by the next save and never deleted.
"""

import contextlib
import copy
import errno
import hashlib
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minimind.errors import CheckpointError, ResourceError
from minimind.model.saving import flush, is_stray
from minimind.training.run import checkpoints, step_of, unreadable

_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_MAKING = ".making-"
_DAMAGED = ".damaged-"


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file. Each access reads one tensor from the disk."""

    def __init__(self, path: Path, names: Collection[str] | None = None) -> None:
        """`names`: the tensors to show; None: all."""
        self._path = path
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        self.shapes = {n: s for n, s in shapes.items() if names is None or n in names}

    def select(self, wanted: Callable[[str], bool]) -> "TensorFile":
        """Restrict to the names that `wanted` accepts."""
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
    """A verified checkpoint of `step` optimizer steps; its tensors are still on the disk."""

    step: int
    path: Path
    model: TensorFile
    optimizer: TensorFile
    state: dict[str, Any]


class CheckpointWriter:
    """Saves the checkpoints of a run in the background, one at a time.

    A write that fails raises its ResourceError here: at the next `check`, `save` or `wait`.
    """

    def __init__(self, run: Path, *, keep: int) -> None:
        self._run, self._keep = run, keep
        self._copies: dict[str, Tensor] = {}  # in host memory; the same for every save
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        *,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
        best: int | None = None,
        protect: Collection[int] = (),
        first: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy what is to be saved, and let `save_checkpoint` write it after calling `first`."""
        self.wait()
        write_copies = partial(
            save_checkpoint,
            self._run,
            step,
            model={name: self._copy(f"model/{name}", t) for name, t in model.items()},
            optimizer={name: self._copy(f"optimizer/{name}", t) for name, t in optimizer.items()},
            state=copy.deepcopy(dict(state)),
            keep=self._keep,
            best=best,
            protect=protect,
        )

        def write() -> None:
            try:
                first()
                write_copies()
            except BaseException as error:
                self._error = error

        # A daemon: who leaves at once, by a second Ctrl-C, does not wait for the disk.
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        # Memory that is new to the process costs more than the copy itself: it is kept.
        if name not in self._copies:
            self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return self._copies[name].copy_(tensor.detach())

    def check(self) -> None:
        """Raise what a write that is over has failed with; do not wait for one that is not."""
        if self._thread and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Return once nothing is being written."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Wait, unless somebody leaves at once. What already goes wrong is not hidden."""
        if kind is None or issubclass(kind, ResourceError):  # too full for metrics: ours says more
            self.wait()
        elif not issubclass(kind, KeyboardInterrupt):
            with contextlib.suppress(ResourceError):
                self.wait()


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
    """Write the checkpoint of `step`; remove all but the newest `keep`, that of step `best` and
    those of the steps in `protect`.

    Those of the same and of later steps were skipped as damaged when the run was resumed: they are
    renamed. Raises ResourceError when it cannot be written; older ones are untouched then.
    """
    home = run / "checkpoints"
    work, place = home / f"{_MAKING}{step:08}", home / f"step-{step:08}"
    needed = sum(t.numel() * t.element_size() for t in (*model.values(), *optimizer.values()))
    try:
        _sweep(home)  # of a run that was killed while saving
        disk = shutil.disk_usage(run)
        if disk.free < needed and disk.total:  # some network disks tell nothing but zeros
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # not half-way through
        work = _unused(work)  # network disks keep .nfs files of what was removed
        work.mkdir(parents=True)
        for name, tensors in zip(_FILES, (model, optimizer), strict=False):
            whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            safetensors.torch.save_file(whole, work / name)
            del whole
        (work / "state.json").write_text(json.dumps(dict(state)), encoding="utf-8")
        for name in _FILES:
            flush(work / name)
        sums = {name: _described(work / name) for name in _FILES}
        (work / "manifest.json").write_text(_manifest(step, sums), encoding="utf-8")
        flush(work / "manifest.json")
        flush(work)
        if place.exists():
            set_aside(place)
        os.replace(work, place)
        flush(home)
        for later in [other for other in checkpoints(run) if step_of(other) > step]:
            set_aside(later)
        needed_still = {best, *protect}
        for old in [o for o in checkpoints(run)[keep:] if step_of(o) not in needed_still]:
            os.replace(old, home / f"{_MAKING}{old.name}")  # first: none is ever there in part
    except (OSError, SafetensorError) as error:
        _sweep(home)
        free = shutil.disk_usage(run).free
        raise ResourceError(
            f"{place}: the checkpoint could not be written ({error}); it needs {needed:,} bytes "
            f"and {free:,} are free. Older checkpoints are whole: free some space and give the "
            "same command again"
        ) from error
    _sweep(home)
    return place


def set_aside(place: Path, prefix: str = _DAMAGED) -> None:
    """Rename a checkpoint, so that no run resumes from it; what it holds stays."""
    os.replace(place, _unused(place.with_name(f"{prefix}{place.name}")))


def _unused(place: Path) -> Path:
    """The path itself, or with the first number that makes it one that does not exist."""
    numbered = (place.with_name(f"{place.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([place], numbered) if not path.exists())


def latest_checkpoint(run: Path, *, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest valid checkpoint, or None if none was ever saved.

    `warn` receives a line for each that is damaged and skipped. Raises CheckpointError when all
    are damaged, and when one cannot be read at the moment.
    """
    found = checkpoints(run)
    for place in found:
        try:
            return _load(place, warn)
        except _Damage as damage:
            warn(
                f"{place} is damaged and skipped: {damage}. The next save renames it to "
                f"{_DAMAGED}{place.name}"
            )
    if found:
        raise CheckpointError(
            f"{run}: every checkpoint is damaged, so the run cannot be resumed. "
            "Restore one from a backup, or start over with --fresh"
        )
    return None


def load_checkpoint(run: Path, step: int) -> Checkpoint:
    """The checkpoint of a step. Raises CheckpointError with what is wrong with it."""
    place = run / "checkpoints" / f"step-{step:08}"
    try:
        return _load(place, lambda warning: None)
    except _Damage as damage:
        raise CheckpointError(f"{place} is damaged: {damage}") from damage


def restore_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into the trained tensors of `model`, one at a time.

    Raises CheckpointError when their names or shapes differ.
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    own = {name: t for name, t in model.state_dict().items() if name not in frozen}
    if checkpoint.model.shapes != {name: tuple(tensor.shape) for name, tensor in own.items()}:
        raise CheckpointError(
            f"{checkpoint.path}: its weights belong to a model of another shape than the one that "
            "this run trains now. Put back the model that the run began with, choose another "
            "--out, or start over with --fresh"
        )
    for name, tensor in own.items():
        tensor.copy_(checkpoint.model[name])


@dataclass(frozen=True)
class Inspected:
    """A checkpoint on the disk; `trouble` says what is wrong with it, if anything is."""

    step: int
    path: Path
    saved: datetime
    bytes: int
    state: dict[str, Any]  # empty where there is trouble
    trouble: str
    unknown: tuple[str, ...] = ()  # names of files that do not belong to a checkpoint


def inspect_checkpoints(run: Path, *, thorough: bool) -> list[Inspected]:
    """The checkpoints of a run, oldest first; `thorough`: read every byte, not only state.json."""
    inspected = []
    for place in reversed(checkpoints(run)):
        trouble, size, state, unknown = "", 0, {}, []
        try:
            saved = datetime.fromtimestamp(place.stat().st_mtime).astimezone()
            if place.is_dir():
                size = sum(file.stat().st_size for file in place.iterdir())
            _verify(place, thorough)
            unknown = _unknown_files(place)
            state = json.loads((place / "state.json").read_bytes())
        except FileNotFoundError:  # a run in progress has just removed it
            continue
        except (_Damage, CheckpointError, OSError) as error:
            trouble = str(error)
        one = Inspected(step_of(place), place, saved, size, state, trouble, tuple(unknown))
        inspected.append(one)
    return inspected


def damaged_checkpoints(run: Path) -> list[Path]:
    """The checkpoints that were set aside."""
    return sorted((run / "checkpoints").glob(f"{_DAMAGED}step-*"))


def newest_state(run: Path) -> dict[str, Any] | None:
    """The state in the newest checkpoint that looks complete; None if there is none."""
    there = inspect_checkpoints(run, thorough=False)
    return next((one.state for one in reversed(there) if not one.trouble), None)


def best_step(there: Sequence[Inspected]) -> int | None:
    """Which step was the best by validation: the newest that can be read knows."""
    best = (one.state.get("best") for one in reversed(there))
    return next((int(known["step"]) for known in best if known), None)


class _Damage(Exception):
    """A checkpoint is incomplete or its bytes are not those that were saved."""


def _load(place: Path, warn: Callable[[str], None]) -> Checkpoint:
    """Verify one checkpoint. Raises _Damage, and CheckpointError when it cannot be read."""
    try:
        _verify(place, thorough=True)
        if unknown := _unknown_files(place):
            warn(f"{place}: {', '.join(unknown)} does not belong to a checkpoint and is not used")
        state = json.loads((place / "state.json").read_bytes())
        model, optimizer = (TensorFile(place / name) for name in _FILES[:2])
        return Checkpoint(step_of(place), place, model, optimizer, state)
    except FileNotFoundError as error:
        raise _Damage(str(error)) from error
    except (OSError, SafetensorError) as error:
        raise unreadable(place, error) from error


def _verify(place: Path, thorough: bool) -> None:
    """Compare the files with the manifest; without `thorough` only sizes, and state.json.

    Raises _Damage; FileNotFoundError when the whole checkpoint is gone; CheckpointError when the
    system cannot read it now (too many open files, no permission, an error of the disk).
    """
    try:
        if missing := sorted({*_FILES, "manifest.json"} - {file.name for file in place.iterdir()}):
            raise _Damage(f"{', '.join(missing)}: missing")
        if thorough:
            _check_manifest(place, {name: _described(place / name) for name in _FILES})
            return
        listed = json.loads((place / "manifest.json").read_bytes())["files"]
        if listed["state.json"] != _described(place / "state.json"):
            raise _Damage("manifest.json does not describe state.json")
        for name in _FILES:
            if (place / name).stat().st_size != listed[name]["bytes"]:
                raise _Damage(f"{name} is not as long as manifest.json says")
    except FileNotFoundError:
        raise
    except (NotADirectoryError, IsADirectoryError) as error:
        raise _Damage(str(error)) from error
    except OSError as error:
        raise unreadable(place, error) from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _Damage(f"manifest.json cannot be used: {error}") from error


def _unknown_files(place: Path) -> list[str]:
    """Names that are neither a checkpoint's nor those that file managers and disks leave behind."""
    if not place.is_dir():
        return []
    names = {file.name for file in place.iterdir()} - {*_FILES, "manifest.json"}
    return sorted(name for name in names if not is_stray(name))


def _check_manifest(place: Path, sums: Mapping[str, Any]) -> None:
    """Only the very bytes that we write pass: a bit that flips in the manifest is noticed too."""
    manifest = (place / "manifest.json").read_bytes()
    if manifest != _manifest(step_of(place), sums).encode():
        strange = [name for name in _FILES if str(sums[name]["sha256"]).encode() not in manifest]
        raise _Damage(f"manifest.json does not describe {', '.join(strange) or place.name}")


def _sweep(home: Path) -> None:
    """Remove what is in the making, or being removed."""
    for rest in home.glob(f"{_MAKING}*"):
        shutil.rmtree(rest, ignore_errors=True)


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _manifest(step: int, sums: Mapping[str, Any]) -> str:
    return json.dumps({"step": step, "files": sums}, indent=1, sort_keys=True) + "\n"
