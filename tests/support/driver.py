"""Child processes of `small_runs.ForkServer`, which train or save and may be killed.

    python -m tests.support.driver OUTPUT

reads one {"work", "arguments"} per line and answers with {"pid"}, then {"status"}.

The driver imports torch once and forks per child, which takes milliseconds. The process that runs
the tests is never killed.
"""

import errno
import gc
import json
import math
import os
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch._dynamo  # optimizers import it, which takes seconds; here once for all children
from torch import nn

from minimind.cli import console, main
from minimind.config import load_recipe
from minimind.data.packing import IGNORED, Batch, MixedDataset
from minimind.errors import ResourceError
from minimind.training import checkpoint, distributed
from minimind.training import deepspeed_backend as zero
from minimind.training.distributed import init_distributed
from minimind.training.lock import run_lock
from minimind.training.objectives import LossOutput
from minimind.training.reporter import Reporter
from minimind.training.stage import run_stage
from tests.support.commands import exit_after
from tests.support.small_runs import REFUSED, nano_trainer, tensors


def train(
    settings: dict[str, Any], pause_at: int | None = None, limits: dict[str, int] | None = None
) -> None:
    """Run a stage; print "reached" from step `pause_at` on, and pause 6 steps later to be killed.

    limits: from a step on, the system refuses to write beyond this byte of any file.
    """

    class Watched(Reporter):
        def progress(self, done: int, total: int, note: str = "") -> None:
            if not note:  # not training yet
                return
            if limit := (limits or {}).get(str(done)):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            # Not "==": an earlier child may have saved a later step before it was killed.
            if pause_at and done >= pause_at:
                print("reached", flush=True)
            if pause_at and done >= pause_at + 6:
                signal.pause()

    run_stage(load_recipe(None, flags=settings).recipe, reporter=Watched())


def train_on_a_disk_that_fills(settings: dict[str, Any], room: int, step: int) -> None:
    """Run a stage; when a save of `step` or later begins, fill the disk up to `room` bytes."""
    run = Path(settings["out"])
    real = os.mkdir

    def mkdir(path: Any, *arguments: Any, **options: Any) -> None:
        real(path, *arguments, **options)
        name = Path(path).name
        if name.startswith(".tmp-") and int(name.removeprefix(".tmp-")) >= step:
            os.mkdir = real
            free = shutil.disk_usage(run).free
            (run.parent / "ballast").write_bytes(bytes(max(0, free - room)))

    os.mkdir = mkdir  # type: ignore[assignment]
    try:
        run_stage(load_recipe(None, flags=settings).recipe, reporter=Reporter())
    except ResourceError as error:
        print(error)
        sys.exit(REFUSED)


def minimind(arguments: list[str], signals: dict[str, list[int]], pause_s: float = 0.0) -> None:
    """Run the command line; send it signals by step, and sleep `pause_s` seconds in each step."""

    class Signalling(console.RichReporter):
        def progress(self, done: int, total: int, note: str = "") -> None:
            time.sleep(pause_s)
            for number in signals.get(str(done), []) if note else []:
                os.kill(os.getpid(), number)

    console.RichReporter = Signalling  # type: ignore[misc]
    sys.argv = ["minimind", *arguments]
    sys.stdin = open(os.devnull)  # not the driver's  # noqa: SIM115
    main.main()


def hold(run: str) -> None:
    """Hold the lock of a run directory until killed."""
    with run_lock(Path(run)):
        print("held", flush=True)
        signal.pause()


def save(
    run: str,
    step: int,
    numbers: int,
    keep: int,
    best: int | None = None,
    point: int | None = None,
    how: str = "kill",
) -> None:
    """Save a checkpoint; die, or find the disk full, at the `point`-th file operation."""
    if how == "limit":  # the system refuses to write beyond this byte of any file
        resource.setrlimit(resource.RLIMIT_FSIZE, (point or 0, resource.RLIM_INFINITY))
    elif point is not None:
        _count_points(point, _die if how == "kill" else _disk_full)
    try:
        checkpoint.save_checkpoint(Path(run), step, keep=keep, best=best, **tensors(step, numbers))
    except ResourceError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        print(error)
        sys.exit(REFUSED)


def restore(run: str) -> None:
    """Restore a checkpoint of 64 tensors, and print by how many bytes the peak memory rises.

    The checkpoint is that of test_resuming_needs_memory_for_only_one_more_tensor.
    """

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ParameterList(nn.Parameter(torch.ones(1 << 20)) for _ in range(32))

    def kilobytes(key: str) -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if key in line)

    model, moments = Model(), {f"m/{n}": torch.ones(1 << 20) for n in range(32)}
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = kilobytes("VmRSS")
    newest = checkpoint.latest_checkpoint(Path(run), warn=print)
    assert newest
    checkpoint.restore_weights(model, newest)
    for name, tensor in moments.items():
        tensor.copy_(newest.optimizer[name])
    assert float(model.layers[31].detach()[5]) == 31.0 and float(moments["m/31"][5]) == 62.0
    print((kilobytes("VmHWM") - before) << 10)


def train_distributed(processes: int, unwatched: bool = False, **arguments: Any) -> None:
    """Call `train_rank` in several processes; when one fails, kill the others.

    unwatched: do not kill them, as on another machine.
    """
    distributed._LAUNCHER_GRACE_S = 0.1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
    children = {}
    for rank in range(processes):
        children[os.fork()] = rank
        if 0 in children:
            os.environ |= {key: str(value) for key, value in shared.items()}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            _work(sys.argv[1], train_rank, arguments)
    while children:
        pid, status = os.wait()
        rank = children.pop(pid)
        if status:
            print(f"rank {rank} failed", flush=True)
            for child in children:
                if not unwatched:
                    os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            sys.exit(os.waitstatus_to_exitcode(status))


def train_rank(
    run: str,
    objective: str,
    settings: dict[str, Any],
    stop: list[int] | None = None,
    kill: list[int] | None = None,
    corrupt: tuple[int, list[int]] | None = None,
    out_of_memory: tuple[int, list[int]] | None = None,
    unlabeled: Sequence[int] = (),
) -> None:
    """Train `small_runs.nano_trainer` as one rank of several.

    Writes the samples that it read to `samples-RANK`, those of validations to `held-out-RANK`, and
    `steps-RANK` and `weights-RANK` at the end.

    stop, kill: (rank, call of its objective) at which it receives SIGTERM or SIGKILL.
    corrupt, out_of_memory: (rank, calls) with a NaN loss, or with an out-of-memory error.
    unlabeled: positions in each global batch whose sequences have no labels.
    """
    samples: list[tuple[int, int]] = []
    held_out: list[tuple[int, int]] = []

    class HeldOut(MixedDataset):
        def batch(self, start: int, count: int) -> Batch:
            held_out.append((start, count))
            return super().batch(start, count)

    class Recorded(MixedDataset):
        def batch(self, start: int, count: int) -> Batch:
            samples.append((start, count))
            batch = super().batch(start, count)
            for row, sample in enumerate(batch.samples):
                if sample % trainer.recipe.training.global_batch_size in unlabeled:
                    batch.labels[row] = IGNORED
            return batch

    class Printing(Reporter):
        def say(self, text: str) -> None:
            print(f"{group.rank}: {text}", flush=True)

    zero._PERSISTENCE_THRESHOLD = 0  # it would replicate all parameters of so small a model
    with init_distributed("cpu") as group:
        reporter = Printing() if group.is_main else Reporter()
        trainer = nano_trainer(Path(run), objective, group=group, reporter=reporter, **settings)
        trainer.data = Recorded(trainer.data.sources, [1.0], trainer.recipe.seed)
        if trainer.validation_data:
            trainer.validation_data = HeldOut(
                trainer.validation_data.sources, [1.0], trainer.recipe.seed
            )
        real, call = trainer.objective.loss, 0

        def loss(*arguments: Any) -> LossOutput:
            nonlocal call
            call += 1
            if [group.rank, call] == stop:
                signal.raise_signal(signal.SIGTERM)
            if [group.rank, call] == kill:
                _die()
            if out_of_memory and group.rank == out_of_memory[0] and call in out_of_memory[1]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            output = real(*arguments)
            if corrupt and group.rank == corrupt[0] and call in corrupt[1]:
                return replace(output, loss_sum=output.loss_sum * math.nan)
            return output

        trainer.objective.loss = loss  # type: ignore[method-assign]
        result = trainer.train()
        torch.save(trainer.model.state_dict(), Path(run) / f"weights-{group.rank}")
        (Path(run) / f"samples-{group.rank}").write_text(json.dumps(samples))
        (Path(run) / f"held-out-{group.rank}").write_text(json.dumps(held_out))
        (Path(run) / f"steps-{group.rank}").write_text(str(result.steps))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _count_points(point: int, act: Callable[[], None]) -> None:
    """Call `act` at the `point`-th point, counted from 0, before or after a file operation.

    The operations are write, flush, rename and removal. "After" a write, half of the file exists.
    """
    passed = 0

    def reach() -> None:
        nonlocal passed
        passed += 1
        if passed == point + 1:
            act()

    def wrap(module: Any, name: str, spoil: Callable[..., None] | None = None) -> None:
        real = getattr(module, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            reach()
            result = real(*arguments, **options)
            if spoil and passed == point:
                spoil(*arguments)
            reach()
            return result

        setattr(module, name, wrapped)

    def cut(path: Path) -> None:
        os.truncate(path, path.stat().st_size // 2)

    wrap(os, "mkdir")
    wrap(os, "fsync")
    wrap(os, "replace")
    wrap(os, "unlink")
    wrap(os, "rmdir")
    wrap(safetensors.torch, "save_file", lambda _, path: cut(path))
    wrap(Path, "write_text", lambda path, *_: cut(path))


def _serve(output: str) -> None:
    for line in sys.stdin:
        command = json.loads(line)
        pid = os.fork()
        if not pid:
            _work(output, globals()[command["work"]], command["arguments"])
        print(json.dumps({"pid": pid}), flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"status": status}), flush=True)


def _work(output: str, function: Callable[..., None], arguments: dict[str, Any]) -> None:
    handle = os.open(output, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(handle, standard)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    exit_after(lambda: function(**arguments))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("MINIMIND_TEST_THREADS", "1")))
    gc.collect()
    gc.freeze()  # a collection would copy all pages of the modules into each child
    _serve(sys.argv[1])
