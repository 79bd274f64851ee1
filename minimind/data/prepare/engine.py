"""Engines: where the tasks of a stage run. The functions and their results are the same in all."""

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from minimind.errors import MinimindError, ResourceError, UsageError, install_line

EngineName = Literal["pool", "ray"]
_QUEUED_PER_WORKER = 2  # so that a worker never waits for the next task


@dataclass(frozen=True)
class Task:
    """A call of a stage function. size: bytes of input, for the progress bar."""

    name: str
    function: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]
    size: int


class Engine(Protocol):
    """Runs tasks on several workers."""

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
        """Yield each task with its result, in the order in which they finish."""


@contextlib.contextmanager
def open_engine(name: EngineName, workers: int) -> Iterator[Engine]:
    """Start an engine; stop all of its tasks at the end of the block.

    Raises UsageError if the engine is not installed.
    """
    if name == "ray":
        with _ray_engine(workers) as ray_engine:
            yield ray_engine
    elif workers == 1:
        yield _InProcess()
    else:
        with _pool_engine(workers) as pool:
            yield pool


class _InProcess:
    """Runs the tasks in this process, one after the other."""

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
        for task in tasks:
            yield task, task.function(*task.arguments)


@contextlib.contextmanager
def _pool_engine(workers: int) -> Iterator["_Pool"]:
    # "spawn": a fork would copy the threads' locks of this process, such as those of a terminal.
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        yield _Pool(executor, workers)
        executor.shutdown()
    finally:
        # After an error or Ctrl-C: a task leaves no partial output, so it need not finish.
        processes = list((executor._processes or {}).values())
        executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()


def _start_worker() -> None:
    """Leave Ctrl-C to the main process, and exit if that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The workers are the parallelism; each of them tokenizes on one thread.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent

    def exit_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


class _Pool:
    """Runs the tasks in a pool of processes on this machine."""

    def __init__(self, executor: ProcessPoolExecutor, workers: int) -> None:
        self._executor, self._workers = executor, workers

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
        waiting = iter(tasks)
        running: dict[Future[dict[str, Any]], Task] = {}
        try:
            while True:
                for task in waiting:
                    running[self._executor.submit(task.function, *task.arguments)] = task
                    if len(running) >= self._workers * _QUEUED_PER_WORKER:
                        break
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise ResourceError(
                "a worker process was killed, probably because the machine is out of memory; run "
                "the same command again with fewer --workers: finished work is kept"
            ) from error


@contextlib.contextmanager
def _ray_engine(workers: int) -> Iterator["_Ray"]:
    try:
        import ray
    except ImportError:
        raise UsageError(f"--engine ray needs Ray: {install_line('ray')}") from None
    is_ours = not ray.is_initialized()
    if is_ours:
        # RAY_ADDRESS names a cluster; without it Ray starts on this machine alone.
        num_cpus = None if os.environ.get("RAY_ADDRESS") else workers
        # The dashboard can be set only where Ray is started.
        dashboard = None if num_cpus is None else False
        try:
            ray.init(
                num_cpus=num_cpus,
                include_dashboard=dashboard,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            address = os.environ.get("RAY_ADDRESS", "this machine")
            raise ResourceError(
                f"Ray cannot be reached at {address} ({error}); check RAY_ADDRESS, or start the "
                "cluster with `ray start --head`"
            ) from error
    try:
        yield _Ray(workers)
    finally:
        if is_ours:
            ray.shutdown()


class _Ray:
    """Runs the tasks on the nodes of a Ray cluster, which share a disk."""

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
        import ray

        # "SPREAD": one node does not get all tasks while the others start.
        remote = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_run_on_one_core)
        waiting = iter(tasks)
        running: dict[Any, Task] = {}
        try:
            while True:
                for task in waiting:
                    running[remote.remote(task.function, task.arguments)] = task
                    if len(running) >= self._workers * _QUEUED_PER_WORKER:
                        break
                if not running:
                    return
                for done in ray.wait(list(running), num_returns=1)[0]:
                    yield running.pop(done), _result(done)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _run_on_one_core(
    function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]
) -> dict[str, Any]:
    """Run a task in a Ray worker, which has one core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return function(*arguments)


def _result(reference: Any) -> dict[str, Any]:
    """Return the result of a Ray task, or raise the exception that it raised."""
    import ray

    try:
        result: dict[str, Any] = ray.get(reference)
        return result
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MinimindError | OSError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise ResourceError(
            f"a Ray worker or node was lost ({type(error).__name__}); run the same command again: "
            "finished work is kept"
        ) from error
