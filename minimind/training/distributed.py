"""Several processes that train one model: which of them this is, and what they tell each other.

Each process holds the whole model and takes an equal share of every batch. Gradients are added up
once a step, after the last micro-batch, in buckets as Li et al. 2020 ("PyTorch Distributed") have
them; unlike there nothing overlaps with the backward pass, since only the sum over all
micro-batches is sent. Then each process takes the same optimizer step from the same numbers.

torchrun, or `--nproc`, starts the processes and says in the environment which is which.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minimind.errors import ConfigError, ResourceError, TrainingError, is_out_of_memory
from minimind.model.device import choose_device

_BUCKET = 1 << 23  # numbers sent at once: 32 MiB
_PATIENCE = timedelta(days=7)  # the others wait while the first tokenizes, validates, saves
_KILLED_WITHIN_S = 5  # of another's death, by whoever started this process
# What gloo, NCCL and torch's store say when a connection is lost or nobody answers, in lower case.
_LOST_CONNECTION = (
    "connection closed",
    "connection reset",
    "connection refused",
    "connection was likely closed",
    "socket closed",
    "broken pipe",
    "timed out",
    "timeout",
    "remote process exited",
    "communicator was aborted",
)


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that train together; alone unless told otherwise."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    local_size: int = 1
    _talk: Any = field(default=None, repr=False)  # a group over the CPU's memory

    @property
    def is_main(self) -> bool:
        """The one that writes: logs, checkpoints, the model; and that shows progress."""
        return self.rank == 0

    def shard(self, start: int, count: int) -> range:
        """Which of samples start … start+count-1 are this process's; all have as many."""
        assert count % self.size == 0, "every process has as many samples"
        each = count // self.size
        return range(start + self.rank * each, start + (self.rank + 1) * each)

    def any_rank(self, flag: bool) -> bool:
        """Whether it is so in any process. Like all that follows, all call it or none does."""
        if self.size == 1:
            return flag
        told = torch.tensor([flag], dtype=torch.uint8)
        with self._company():
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self._talk)
        return bool(told)

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Put the sums over all processes in place of tensors of one type and device."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            with self._company():
                dist.all_reduce(flat, group=None if flat.is_cuda else self._talk)
            parts = flat.split([tensor.numel() for tensor in bucket])
            shaped = [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)]
            torch._foreach_copy_(bucket, shaped)

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Put the first process's numbers in place of everybody's."""
        for tensor in tensors if self.size > 1 else ():
            with self._company():
                dist.broadcast(tensor, 0, group=None if tensor.is_cuda else self._talk)

    def broadcast_object(self, value: Any) -> Any:
        """What the first process says, as JSON can; what the others give is of no matter."""
        if self.size == 1:
            return value
        text = bytearray(json.dumps(value).encode() if self.is_main else b"")
        size = torch.tensor([len(text)])
        self.broadcast_([size])
        told = torch.frombuffer(text, dtype=torch.uint8) if self.is_main else None
        told = torch.empty(int(size), dtype=torch.uint8) if told is None else told
        self.broadcast_([told])
        return json.loads(told.numpy().tobytes())

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Each process's tensor, by rank; all are of one shape, and in the CPU's memory."""
        if self.size == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        with self._company():
            dist.all_gather(found, tensor, group=self._talk)
        return found

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The first process does it, then all others: they find made what it has made."""
        if not self.is_main:
            self.any_rank(False)
        yield
        if self.is_main:
            self.any_rank(False)

    @contextlib.contextmanager
    def _company(self) -> Iterator[None]:
        """Raise TrainingError for a lost connection to another process; other errors stay.

        Whoever started this process sees that too, says which one it was, and ends this one: with
        a message of its own it waits, for it may be on another machine.
        """
        try:
            yield
        except RuntimeError as error:
            if not _is_lost_connection(error):
                raise
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(_KILLED_WITHIN_S)
            raise TrainingError(
                f"process {self.rank} of 0-{self.size - 1}: another process of this run has ended; "
                "the same command goes on from the last checkpoint"
            ) from error


def _is_lost_connection(error: RuntimeError) -> bool:
    message = str(error).lower()
    return any(words in message for words in _LOST_CONNECTION) and not is_out_of_memory(error)


SINGLE_PROCESS = ProcessGroup()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, some at a time."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextlib.contextmanager
def join(device: str) -> Iterator[ProcessGroup]:
    """Meet the processes that were started together with this one; alone if none were.

    Raises ConfigError or ResourceError for a device of which there is not one for each, ConfigError
    when somebody else than a launcher has set RANK.
    """
    if "RANK" not in os.environ:
        yield SINGLE_PROCESS
        return
    told = os.environ
    try:
        rank, size, local_rank = (int(told[x]) for x in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        # DeepSpeed's launcher has a name of its own for it.
        local_size = int(told.get("LOCAL_WORLD_SIZE") or told["LOCAL_SIZE"])
    except KeyError as error:
        raise ConfigError(
            f"RANK is set and {error.args[0]} is not: start several processes by torchrun or "
            "--nproc, and one without RANK"
        ) from None
    own = local_device(device, ProcessGroup(rank, size, local_rank, local_size))
    if own.type == "cuda":
        torch.cuda.set_device(own)
        dist.init_process_group("nccl", device_id=own)
        talk = dist.new_group(backend="gloo", timeout=_PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=_PATIENCE)
        talk = dist.group.WORLD
    yield ProcessGroup(rank, size, local_rank, local_size, talk)
    dist.destroy_process_group()  # not after an error: others may be gone, or be waiting


def local_device(name: str, workers: ProcessGroup) -> torch.device:
    """The device of this process: on a machine with GPUs each has its own.

    Raises ConfigError or ResourceError when there is not one for each.
    """
    device = choose_device(name)
    if workers.size == 1 or device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise ConfigError(
            f"device={name}: {workers.size} processes need a device each; use cuda, or cpu"
        )
    if workers.local_size > torch.cuda.device_count():
        raise ResourceError(
            f"{workers.local_size} processes on this machine need as many GPUs, and it has "
            f"{torch.cuda.device_count()}; start fewer processes, or give --device cpu"
        )
    return torch.device("cuda", workers.local_rank)
