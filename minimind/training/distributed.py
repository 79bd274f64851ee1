"""Data-parallel training: ranks, world size and collectives.

Each process holds a replica of the model and takes an equal shard of every batch. Gradients are
all-reduced once per step, after the last micro-batch of gradient accumulation, in buckets (Li et
al. 2020, "PyTorch Distributed", section 3.2.2). Unlike in PyTorch's DDP the all-reduce does not
overlap with the backward pass. All replicas then take the same optimizer step.

torchrun or `--nproc` starts the processes and sets RANK, WORLD_SIZE and the like.
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

from minimind.errors import (
    ConfigError,
    ResourceError,
    TrainingError,
    is_out_of_memory,
    same_command,
)
from minimind.model.device import choose_device

_BUCKET_NUMEL = 1 << 23  # 32 MiB of float32
TIMEOUT = timedelta(days=7)  # the other ranks wait while rank 0 tokenizes, validates and saves
_LAUNCHER_GRACE_S = 5  # within which the launcher kills the remaining processes
# Messages of gloo, NCCL and torch's store for a lost connection or a timeout, in lower case.
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
    """This process and its collectives; a single process by default.

    Every method but `shard` is a collective: all ranks must call it, in the same order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # rank on this machine
    local_size: int = 1
    cpu_group: Any = field(default=None, repr=False)  # gloo, for tensors in host memory

    @property
    def is_main(self) -> bool:
        """True for rank 0, which writes logs, checkpoints and the model, and shows progress."""
        return self.rank == 0

    # --8<-- [start:shard]
    def shard(self, start: int, count: int) -> range:
        """Return this rank's shard of the samples start … start + count - 1."""
        assert count % self.size == 0, "all shards have the same size"
        shard_size = count // self.size
        return range(start + self.rank * shard_size, start + (self.rank + 1) * shard_size)

    # --8<-- [end:shard]

    def any_rank(self, flag: bool) -> bool:
        """Logical OR over all ranks."""
        if self.size == 1:
            return flag
        # --8<-- [start:any-rank]
        flags = torch.tensor([flag], dtype=torch.uint8)
        with self.collective_errors():
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.cpu_group)
        return bool(flags)
        # --8<-- [end:any-rank]

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors of one dtype and device over all ranks, in place."""
        if self.size == 1:
            return
        # --8<-- [start:all-reduce]
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            with self.collective_errors():
                dist.all_reduce(flat, group=None if flat.is_cuda else self.cpu_group)
            parts = flat.split([tensor.numel() for tensor in bucket])
            sums = [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)]
            torch._foreach_copy_(bucket, sums)
        # --8<-- [end:all-reduce]

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Broadcast tensors from rank 0, in place."""
        for tensor in tensors if self.size > 1 else ():
            with self.collective_errors():
                dist.broadcast(tensor, 0, group=None if tensor.is_cuda else self.cpu_group)

    def broadcast_object(self, value: Any) -> Any:
        """Broadcast a JSON-serializable object from rank 0; the values of others are ignored."""
        if self.size == 1:
            return value
        text = bytearray(json.dumps(value).encode() if self.is_main else b"")
        num_bytes = torch.tensor([len(text)])
        self.broadcast_([num_bytes])
        if self.is_main:
            buffer = torch.frombuffer(text, dtype=torch.uint8)
        else:
            buffer = torch.empty(int(num_bytes), dtype=torch.uint8)
        self.broadcast_([buffer])
        return json.loads(buffer.numpy().tobytes())

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Gather a tensor in host memory, of the same shape on all ranks; indexed by rank."""
        if self.size == 1:
            return [tensor]
        tensors = [torch.empty_like(tensor) for _ in range(self.size)]
        with self.collective_errors():
            dist.all_gather(tensors, tensor, group=self.cpu_group)
        return tensors

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block on rank 0 first, then on the others, which find its cached results."""
        if not self.is_main:
            self.any_rank(False)
        yield
        if self.is_main:
            self.any_rank(False)

    @contextlib.contextmanager
    def collective_errors(self) -> Iterator[None]:
        """Turn a lost connection into TrainingError; let other errors through.

        The launcher notices the lost process too, reports it, and terminates this one. Wait for
        that before raising: only a process on another machine reports the error itself.
        """
        try:
            yield
        except RuntimeError as error:
            if not _is_lost_connection(error):
                raise
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(_LAUNCHER_GRACE_S)
            raise TrainingError(
                f"process {self.rank} of 0-{self.size - 1}: another process of this run has ended; "
                f"run {same_command()} again to resume from the last checkpoint"
            ) from error


def _is_lost_connection(error: RuntimeError) -> bool:
    message = str(error).lower()
    return any(part in message for part in _LOST_CONNECTION) and not is_out_of_memory(error)


SINGLE_PROCESS = ProcessGroup()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Split tensors, in order, into buckets of at most _BUCKET_NUMEL elements or one tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET_NUMEL:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextlib.contextmanager
def init_distributed(device: str) -> Iterator[ProcessGroup]:
    """Join the process group that the environment describes; a single process without RANK.

    Raises ConfigError or ResourceError if there is not one device per process, and ConfigError if
    RANK is set without the launcher's other variables.
    """
    if "RANK" not in os.environ:
        yield SINGLE_PROCESS
        return
    env = os.environ
    try:
        rank, size, local_rank = (int(env[x]) for x in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        # DeepSpeed's launcher sets LOCAL_SIZE instead.
        local_size = int(env.get("LOCAL_WORLD_SIZE") or env["LOCAL_SIZE"])
    except KeyError as error:
        raise ConfigError(
            f"RANK is set and {error.args[0]} is not. Start several processes with torchrun or "
            "--nproc, and unset RANK to train in a single process"
        ) from None
    own_device = local_device(device, ProcessGroup(rank, size, local_rank, local_size))
    if own_device.type == "cuda":
        if own_device.index is None:  # a single process
            own_device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(own_device)
        dist.init_process_group("nccl", device_id=own_device)
        cpu_group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
        cpu_group = dist.group.WORLD
    yield ProcessGroup(rank, size, local_rank, local_size, cpu_group)
    dist.destroy_process_group()  # not after an error: other ranks may be gone, or waiting


def local_device(name: str, group: ProcessGroup) -> torch.device:
    """Return the device of this process; several processes on a machine take one GPU each.

    Raises ConfigError or ResourceError if there is not one device per process.
    """
    device = choose_device(name)
    if group.size == 1 or device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise ConfigError(
            f"device={name}: {group.size} processes need one device each; use cuda or cpu"
        )
    if group.local_size > torch.cuda.device_count():
        raise ResourceError(
            f"{group.local_size} processes on this machine need one GPU each, and it has "
            f"{torch.cuda.device_count()}; start fewer processes, or use --device cpu"
        )
    return torch.device("cuda", group.local_rank)
