"""Micro-batch sizes that fit into memory: reduced when the device runs out of it.

The gradient of a step does not depend on the micro-batch size. After running out of memory, the
step is repeated with smaller micro-batches and more gradient accumulation.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from minimind.errors import ResourceError, is_out_of_memory
from minimind.training.distributed import ProcessGroup
from minimind.training.memory import divisors, release_unused
from minimind.training.reporter import Reporter, pluralize
from minimind.training.run import has_begun

_T = TypeVar("_T")


@dataclass
class BatchSizes:
    """Sequences per forward pass, in training and in evaluation; the same on all ranks."""

    train: int  # the micro-batch size
    per_process: int  # each rank's share of a global batch
    run: Path
    device: torch.device
    reporter: Reporter
    activation_checkpointing: bool
    max_eval: int = 8

    @property
    def eval(self) -> int:
        """Sequences per forward pass in evaluation, at most as many as in training."""
        return min(self.max_eval, self.train)

    def reduce(self, where: str) -> None:
        """Reduce the micro-batch size to the largest divisor of the share up to half of it.

        Call this outside the `except` block: the traceback of an error that is being handled keeps
        the frames, and so the activations, alive. Raises ResourceError if one sequence is too much.
        """
        release_unused(self.device)
        smaller = next((n for n in divisors(self.per_process) if n <= self.train // 2), None)
        where = f"{where}: out of memory on {self.device} at micro-batch size {self.train}"
        if smaller is None:
            raise ResourceError(f"{self.run}: {where}; {self._advice(training=True)}")
        self.reporter.say(f"{where}; continuing with {smaller} and more gradient accumulation")
        self.train = smaller

    def map_eval_batches(
        self, count: int, group: ProcessGroup, compute: Callable[[int, int], _T]
    ) -> Iterator[_T | None]:
        """Yield `compute(first sample, size)` for each batch of this rank's share of `count`.

        All ranks yield equally often; None where a rank has no samples left. When a rank runs out
        of memory, all ranks halve the batch size and try again. Raises ResourceError if one
        sequence is too much.
        """
        share = -(-count // group.size)
        start = group.rank * share
        end = min(start + share, count)
        done = 0
        while done < share:
            batch_size, result = self.eval, None
            size = min(batch_size, end - start - done)

            def attempt(start: int = start + done, size: int = size) -> None:
                nonlocal result
                result = compute(start, size) if size > 0 else None

            if fits_in_memory(group, attempt):
                yield result
                done += batch_size
                continue
            result = None
            release_unused(self.device)
            sequences = pluralize(batch_size, "sequence")
            where = f"out of memory on {self.device} while evaluating {sequences}"
            if batch_size == 1:
                raise ResourceError(f"{self.run}: {where}; {self._advice(training=False)}")
            self.max_eval = batch_size // 2
            self.reporter.say(f"{where}; continuing with {self.max_eval}")

    def _advice(self, *, training: bool) -> str:
        """Suggest what helps when a single sequence does not fit, and this run still allows."""
        options = []
        if training and not self.activation_checkpointing:
            options.append("set training.activation_checkpointing=true")
        if not has_begun(self.run):  # a run that has begun keeps its model and sequence length
            options.append("use a smaller model or a shorter data.seq_len")
        return ", ".join([*options, "or " * bool(options) + "free memory on the device"])


def is_memory_error(error: Exception) -> bool:
    """True if the device or the host ran out of memory."""
    return isinstance(error, MemoryError) or is_out_of_memory(error)


def fits_in_memory(group: ProcessGroup, work: Callable[[], None]) -> bool:
    """Run `work` on every rank; return False, on all ranks, if any ran out of memory."""
    ran_out = False
    try:
        work()
    except (RuntimeError, MemoryError) as error:
        if not is_memory_error(error):
            raise
        ran_out = True
    return not group.any_rank(ran_out)
