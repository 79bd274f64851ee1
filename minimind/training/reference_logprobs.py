"""Reference log-probabilities for DPO, computed once and cached in the run directory.

The reference is the model at the start of training. Its log-probabilities of all answers are
computed before the first step and saved as `reference.safetensors`, so that no second model is in
memory during training.
"""

import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minimind.config import identity
from minimind.data.packing import MixedDataset, PairSequences
from minimind.errors import ResourceError, same_command
from minimind.files import atomic_file
from minimind.training.batch import to_device
from minimind.training.batch_sizes import fits_in_memory
from minimind.training.distributed import ProcessGroup
from minimind.training.objectives.preference import answer_logps
from minimind.training.run import with_paths
from minimind.training.trainer import Trainer

FILE = "reference.safetensors"
_Arrays = dict[str, NDArray[np.float32]]  # [pairs, 2] each; NaN where not computed


def compute_reference_logprobs(trainer: Trainer) -> None:
    """Fill in the reference log-probabilities of the trainer's pairs, from the cache if possible.

    Raises ResourceError if the cache cannot be written.
    """
    group, path, key = trainer.group, trainer.run / FILE, _cache_key(trainer)
    arrays = _reference_arrays(trainer)
    if not group.broadcast_object(group.is_main and _read_cache(trainer, path, key, arrays)):
        _compute(trainer)
        _average_over_ranks(group, arrays)
        if group.is_main:
            _save(path, key, arrays)
    group.broadcast_([torch.from_numpy(array) for array in arrays.values()])


def _reference_arrays(trainer: Trainer) -> _Arrays:
    """Return the datasets' own arrays of reference log-probabilities, by name in the file."""
    datasets = {"train": trainer.data}
    datasets |= {"validation": trainer.validation_data} if trainer.validation_data else {}
    return {
        f"{name}.{number}": source.reference
        for name, dataset in datasets.items()
        for number, source in enumerate(dataset.sources)
        if isinstance(source, PairSequences)
    }


def _cache_key(trainer: Trainer) -> str:
    """Hash everything that the log-probabilities and their order depend on.

    Paths do not matter: the hashes of data and weights are a part of it, and a run may have moved.
    """
    settings = json.dumps(identity(with_paths(trainer.recipe, lambda path: "")), sort_keys=True)
    return hashlib.sha256(
        f"{trainer.data_sha256} {trainer.base_sha256} {trainer.num_steps}\n{settings}".encode()
    ).hexdigest()


def _compute(trainer: Trainer) -> None:
    """Compute the log-probabilities of all sequences that this rank will train or validate on.

    They are computed in the same batches and by the same kernels as in training. The first loss is
    then exactly that of a zero margin, in any precision. After running out of memory, training and
    validation use the smaller batches too.
    """
    batch_size, group = trainer.recipe.training.global_batch_size, trainer.group
    num_train = trainer.num_steps * batch_size // group.size
    epoch_size = trainer.validation_data.order.epoch_size if trainer.validation_data else 0
    num_held_out = min(trainer.recipe.validation.num_sequences, epoch_size)
    total = num_train + -(-num_held_out // group.size)
    trainer.model.eval()
    trainer.reporter.start("reference log-probabilities", total, unit="sequence")
    try:
        for step in range(trainer.num_steps):
            while not fits_in_memory(group, partial(_compute_step, trainer, step)):
                trainer.batch_sizes.reduce(f"reference log-probabilities of step {step + 1}")
            trainer.reporter.progress((step + 1) * batch_size // group.size, total)
        done = num_train
        compute = partial(_compute_held_out, trainer)
        for size in trainer.batch_sizes.map_eval_batches(num_held_out, group, compute):
            done += size or 0
            trainer.reporter.progress(done, total)
    finally:
        trainer.reporter.stop()


def _compute_step(trainer: Trainer, step: int) -> None:
    batch_size = trainer.recipe.training.global_batch_size
    size = trainer.batch_sizes.train
    for sample in trainer.group.shard(step * batch_size, batch_size)[::size]:
        _compute_samples(trainer, trainer.data, sample, size, training=True)


def _compute_held_out(trainer: Trainer, start: int, count: int) -> int:
    assert trainer.validation_data is not None
    _compute_samples(trainer, trainer.validation_data, start, count, training=False)
    return count


def _compute_samples(
    trainer: Trainer, dataset: MixedDataset, start: int, count: int, *, training: bool
) -> None:
    """Fill in samples start … start + count - 1; values from an earlier epoch are kept."""
    places = dataset.order.locate(start, count)
    references = dataset.references(places)  # [pairs, 2] per sequence
    if not any(np.isnan(reference).any() for reference in references):
        return
    batch = to_device(dataset.stack(places), trainer.device)
    # CPU kernels differ with and without gradients, and so would the last bits.
    with torch.set_grad_enabled(training), trainer.precision.autocast():
        logps, _ = answer_logps(trainer.model, batch)  # [P, 2]
    computed = logps.detach().cpu().numpy()
    for reference in references:
        new, computed = computed[: len(reference)], computed[len(reference) :]
        reference[:] = np.where(np.isnan(reference), new, reference)


def _average_over_ranks(group: ProcessGroup, arrays: _Arrays) -> None:
    """Average each value over the ranks that computed it, in place."""
    for array in arrays.values() if group.size > 1 else ():
        tensor = torch.from_numpy(array)
        values, counts = tensor.nan_to_num(), (~tensor.isnan()).float()
        group.all_reduce_([values, counts])
        tensor.copy_(values / counts)


def _read_cache(trainer: Trainer, path: Path, key: str, arrays: _Arrays) -> bool:
    """Fill the arrays from the file; return False if there is no valid file."""
    try:
        cached = _load(path, key)
    except (OSError, ValueError, SafetensorError) as error:
        if path.exists():
            trainer.reporter.say(f"{path} cannot be used and is computed again: {error}")
        return False
    for name, array in arrays.items():
        array[:] = cached[name]
    return True


def _load(path: Path, key: str) -> _Arrays:
    """Read and verify the file. Raises ValueError if it is damaged or belongs to another run."""
    with safe_open(path, "numpy") as file:
        metadata = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata.get("sha256") != _sha256(metadata.get("key", ""), arrays):
        raise ValueError("it is damaged")
    if metadata["key"] != key:
        raise ValueError("it belongs to other data, settings or weights")
    return arrays


def _save(path: Path, key: str, arrays: _Arrays) -> None:
    """Write the file atomically. Raises ResourceError if that fails."""
    try:
        with atomic_file(path) as temporary:
            save_file(arrays, temporary, metadata={"key": key, "sha256": _sha256(key, arrays)})
    except (OSError, SafetensorError) as error:
        num_bytes = sum(array.nbytes for array in arrays.values())
        raise ResourceError(
            f"{path}: cannot be written ({error}); it needs {num_bytes:,} bytes. Free some space "
            f"and run {same_command()} again"
        ) from error


def _sha256(key: str, arrays: _Arrays) -> str:
    digest = hashlib.sha256(key.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()
