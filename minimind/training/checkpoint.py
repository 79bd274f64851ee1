"""Checkpoints that are whole or not there, and that notice every changed bit.

    checkpoints/step-00001000/model.safetensors      weights that are trained
                              optimizer.safetensors  moments and random states
                              state.json             where the run stood
                              manifest.json          sizes and sha256 sums; written last

All of it is written into a hidden directory beside, flushed to the disk, then renamed: in a thread
of its own, so that training waits for no more than a copy of the tensors in memory.
"""

import contextlib
import copy
import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from minimind.errors import CheckpointError, ResourceError

_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_NAME = re.compile(r"step-(\d{8,})")
_MAKING = ".making-"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after `step` optimizer steps."""

    step: int
    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
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
        first: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy what is to be saved, and let `save_checkpoint` write it after calling `first`."""
        self.wait()
        copies = {
            kind: {name: self._copy(f"{kind}/{name}", tensor) for name, tensor in tensors.items()}
            for kind, tensors in (("model", model), ("optimizer", optimizer))
        }
        remembered, keep = copy.deepcopy(dict(state)), self._keep

        def write() -> None:
            try:
                first()
                save_checkpoint(self._run, step, **copies, state=remembered, keep=keep, best=best)
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
) -> Path:
    """Write the checkpoint of `step`; remove all but the newest `keep` and that of step `best`.

    Raises ResourceError when it cannot be written; older ones are untouched then.
    """
    home = run / "checkpoints"
    work, place = home / f"{_MAKING}{step:08}", home / f"step-{step:08}"
    needed = sum(t.numel() * t.element_size() for t in (*model.values(), *optimizer.values()))
    try:
        _sweep(home)  # of a run that was killed while saving
        disk = shutil.disk_usage(run)
        if disk.free < needed and disk.total:  # some network disks tell nothing but zeros
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # not half-way through
        work.mkdir(parents=True)
        for name, tensors in zip(_FILES, (model, optimizer), strict=False):
            whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            safetensors.torch.save_file(whole, work / name)
            del whole
        (work / "state.json").write_text(json.dumps(dict(state)), encoding="utf-8")
        for name in _FILES:
            _flush(work / name)
        sums = {name: _described(work / name) for name in _FILES}
        (work / "manifest.json").write_text(_manifest(step, sums), encoding="utf-8")
        _flush(work / "manifest.json")
        _flush(work)
        if place.exists():  # a damaged one that was passed over
            os.replace(place, home / f"{_MAKING}{step:08}.damaged")
        os.replace(work, place)
        _flush(home)
        for old in _outdated(home, step, keep, best):  # renamed first: none is ever there in part
            os.replace(old, home / f"{_MAKING}{old.name}")
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


def latest_checkpoint(run: Path, *, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None if none was ever saved.

    `warn` is told of each that is damaged and passed over. Raises CheckpointError when all are.
    """
    found = _found(run / "checkpoints")
    for place in found:
        try:
            return _load(place)
        except (OSError, ValueError, SafetensorError) as error:
            warn(f"{place} is damaged and passed over: {error}")
    if found:
        raise CheckpointError(
            f"{run}: no checkpoint is whole any more, so the run cannot go on. "
            "Restore one from a backup, or start over with --fresh"
        )
    return None


def load_checkpoint(run: Path, step: int) -> Checkpoint:
    """The checkpoint of a step. Raises CheckpointError with what is wrong with it."""
    place = run / "checkpoints" / f"step-{step:08}"
    try:
        return _load(place)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{place} is damaged: {error}") from error


@dataclass(frozen=True)
class Inspected:
    """A checkpoint as it lies on the disk; `trouble` says what is wrong with it, if anything is."""

    step: int
    path: Path
    saved: datetime
    bytes: int
    state: dict[str, Any]  # empty where there is trouble
    trouble: str


def inspect_checkpoints(run: Path, *, thorough: bool) -> list[Inspected]:
    """The checkpoints of a run, oldest first; `thorough`: read every byte, not only state.json."""
    inspected = []
    for place in reversed(_found(run / "checkpoints")):
        try:
            trouble = _trouble(place, thorough)
            files = [file.stat() for file in place.iterdir()] if place.is_dir() else []
            saved = datetime.fromtimestamp(place.stat().st_mtime).astimezone()
            state = {} if trouble else json.loads((place / "state.json").read_bytes())
        except FileNotFoundError:  # a run that goes on has just removed it
            continue
        size = sum(file.st_size for file in files)
        inspected.append(Inspected(_step(place), place, saved, size, state, trouble))
    return inspected


def best_step(there: Sequence[Inspected]) -> int | None:
    """Which step was the best by validation: the newest that can be read knows."""
    best = (one.state.get("best") for one in reversed(there))
    return next((int(known["step"]) for known in best if known), None)


def _trouble(place: Path, thorough: bool) -> str:
    try:
        _check_names(place)
        if thorough:
            _check_manifest(place, {name: _described(place / name) for name in _FILES})
        else:
            listed = json.loads((place / "manifest.json").read_bytes())["files"]
            if listed["state.json"] != _described(place / "state.json"):
                raise ValueError("manifest.json does not describe state.json")
            for name in _FILES:
                if (place / name).stat().st_size != listed[name]["bytes"]:
                    raise ValueError(f"{name} is not as long as manifest.json says")
    except FileNotFoundError:  # all of it may be gone
        raise
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        return str(error)
    return ""


def _load(place: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises ValueError with what is wrong."""
    _check_names(place)
    contents = {name: (place / name).read_bytes() for name in _FILES}
    _check_manifest(
        place,
        {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in contents.items()
        },
    )
    return Checkpoint(
        _step(place),
        place,
        safetensors.torch.load(contents["model.safetensors"]),
        safetensors.torch.load(contents["optimizer.safetensors"]),
        json.loads(contents["state.json"]),
    )


def _check_names(place: Path) -> None:
    names = {file.name for file in place.iterdir()}
    if wrong := names ^ {*_FILES, "manifest.json"}:
        raise ValueError(f"{', '.join(sorted(wrong))}: missing, or does not belong here")


def _check_manifest(place: Path, sums: Mapping[str, Any]) -> None:
    """Only the very bytes that we write pass: a bit that flips in the manifest is noticed too."""
    manifest = (place / "manifest.json").read_bytes()
    if manifest != _manifest(_step(place), sums).encode():
        strange = [name for name in _FILES if str(sums[name]["sha256"]).encode() not in manifest]
        raise ValueError(f"manifest.json does not describe {', '.join(strange) or place.name}")


def _step(place: Path) -> int:
    return int(place.name.removeprefix("step-"))


def _found(home: Path) -> list[Path]:
    """Checkpoints by name, newest first."""
    if not home.is_dir():
        return []
    places = [place for place in home.iterdir() if _NAME.fullmatch(place.name)]
    return sorted(places, key=_step, reverse=True)


def _outdated(home: Path, step: int, keep: int, best: int | None) -> list[Path]:
    """What goes once `step` is saved: old ones, and later ones, which were damaged."""
    found = _found(home)
    later = [place for place in found if _step(place) > step]
    return later + [place for place in found[len(later) + keep :] if _step(place) != best]


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


def _flush(path: Path) -> None:
    """Ask the system to put a file, or a directory's list of names, on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows flushes names by itself
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
