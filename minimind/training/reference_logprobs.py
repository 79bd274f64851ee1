"""What the model that training began with thinks of both answers of each preference pair.

Asked once, before the first step, and kept in the run directory as `reference.safetensors`: then
no second model is ever in memory.
"""

import hashlib
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minimind.config import identity
from minimind.data.packing import MixedDataset, PairSequences
from minimind.errors import ResourceError
from minimind.training.batch import to_device
from minimind.training.distributed import ProcessGroup
from minimind.training.objectives.preference import answer_logps
from minimind.training.trainer import Trainer, evaluated, fits_in_memory, take_fewer

FILE = "reference.safetensors"
_Arrays = dict[str, NDArray[np.float32]]


def compute_reference_logprobs(job: Trainer) -> None:
    """Give the run's pairs the log-probabilities of `job.model` as it is now, or those kept.

    Raises ResourceError when they cannot be written.
    """
    path, key, arrays = job.run / FILE, _key(job), _arrays(job)
    if not job.workers.broadcast_object(job.workers.is_main and _take_kept(job, path, key, arrays)):
        _ask(job)
        _put_together(job.workers, arrays)
        if job.workers.is_main:
            _save(path, key, arrays)
    job.workers.broadcast_([torch.from_numpy(array) for array in arrays.values()])


def _take_kept(job: Trainer, path: Path, key: str, arrays: _Arrays) -> bool:
    """Fill the arrays from the file; False if there is none that fits."""
    try:
        kept = _load(path, key)
    except (OSError, ValueError, SafetensorError) as error:
        if path.exists():
            job.reporter.say(f"{path} is not used, and made again: {error}")
        return False
    for name, array in arrays.items():
        array[:] = kept[name]
    return True


def _put_together(workers: ProcessGroup, arrays: _Arrays) -> None:
    """Give each pair what the processes that asked found; the mean, if several did."""
    for array in arrays.values() if workers.size > 1 else ():
        found = torch.from_numpy(array)
        values, askers = found.nan_to_num(), (~found.isnan()).float()
        workers.all_reduce_([values, askers])
        found.copy_(values / askers)


def _key(job: Trainer) -> str:
    """All that the log-probabilities and their order come from."""
    settings = json.dumps(identity(job.recipe), sort_keys=True)
    return hashlib.sha256(
        f"{job.data_sha256} {job.base_sha256} {job.num_steps}\n{settings}".encode()
    ).hexdigest()


def _arrays(job: Trainer) -> _Arrays:
    """Where the log-probabilities belong, by name."""
    mixes = {"train": job.data} | ({"held_out": job.held_out} if job.held_out else {})
    return {
        f"{name}.{number}": part.reference
        for name, mix in mixes.items()
        for number, part in enumerate(mix.sources)
        if isinstance(part, PairSequences)
    }


def _ask(job: Trainer) -> None:
    """Read each window that this process will read, in the batches and kernels of its turn.

    So the first loss of a run is that of no difference at all, in any precision. Where memory runs
    out, training and validation take fewer windows at once too.
    """
    batch, workers = job.recipe.training.global_batch_size, job.workers
    training = job.num_steps * batch // workers.size
    held_out = min(job.recipe.validation.num_sequences, _size(job.held_out))
    total = training + -(-held_out // workers.size)
    job.model.eval()
    job.reporter.start("reference log-probabilities", total, unit="window")
    try:
        for step in range(job.num_steps):
            while not fits_in_memory(workers, partial(_fill_step, job, step)):
                take_fewer(job, f"reference log-probabilities of step {step + 1}")
            job.reporter.progress((step + 1) * batch // workers.size, total)
        done = training
        for number in evaluated(job, workers, held_out, partial(_fill_held_out, job)):
            done += number or 0
            job.reporter.progress(done, total)
    finally:
        job.reporter.stop()


def _size(mix: MixedDataset | None) -> int:
    return mix.order.epoch_size if mix else 0


def _fill_step(job: Trainer, step: int) -> None:
    batch = job.recipe.training.global_batch_size
    for sample in job.workers.shard(step * batch, batch)[:: job.micro_batch]:
        _fill(job, job.data, sample, job.micro_batch, training=True)


def _fill_held_out(job: Trainer, start: int, count: int) -> int:
    assert job.held_out is not None
    _fill(job, job.held_out, start, count, training=False)
    return count


def _fill(job: Trainer, mix: MixedDataset, start: int, count: int, *, training: bool) -> None:
    """Samples start … start+count-1 of the run; what is known from an earlier epoch stays."""
    places = mix.order.locate(start, count)
    known = mix.references(places)
    if not any(np.isnan(one).any() for one in known):
        return
    batch = to_device(mix.stack(places), job.device)
    # A CPU has other kernels where a gradient will be wanted; here it is only given away.
    with torch.set_grad_enabled(training), job.precision.autocast():
        logps, _ = answer_logps(job.model, batch)
    found = logps.detach().cpu().numpy()
    for one in known:
        now, found = found[: len(one)], found[len(one) :]
        one[:] = np.where(np.isnan(one), now, one)


def _load(path: Path, key: str) -> _Arrays:
    """Raises ValueError for a file that is damaged or of another run."""
    with safe_open(path, "numpy") as file:
        metadata = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata.get("sha256") != _sha256(metadata.get("key", ""), arrays):
        raise ValueError("it is damaged")
    if metadata["key"] != key:
        raise ValueError("it is of other data, settings or weights")
    return arrays


def _save(path: Path, key: str, arrays: _Arrays) -> None:
    beside = path.with_name(f".{path.name}.making")
    try:
        save_file(arrays, beside, metadata={"key": key, "sha256": _sha256(key, arrays)})
        with beside.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        needed = sum(array.nbytes for array in arrays.values())
        raise ResourceError(
            f"{path}: cannot be written ({error}); it needs {needed:,} bytes. Free some space and "
            "give the same command again"
        ) from error


def _sha256(key: str, arrays: _Arrays) -> str:
    digest = hashlib.sha256(key.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()
