"""`--nproc N`: run one command line in N data-parallel processes on this machine.

torchrun does the same across machines, and training behaves the same under both.
"""

import os
import signal
import socket
import subprocess
import sys
import time

import typer

from minimind.environment import EXIT_WITH_PARENT_VARIABLE, num_cores, python_module
from minimind.errors import TrainingError, same_command
from minimind.signals import count_interrupts, exit_when_stdin_closes

_POLL_S = 0.05
INTERRUPTED = 130


def is_main_process() -> bool:
    """Return True on rank 0, the only rank that prints messages."""
    return os.environ.get("RANK", "0") == "0"


def is_distributed() -> bool:
    """Return True if torchrun or `launch_processes` started this process."""
    return "RANK" in os.environ


def interrupted_status() -> int:
    """Return the exit status of a run that was stopped by Ctrl-C and has saved a checkpoint.

    130 as for any interrupted program, but 0 under torchrun, which would report a failure.
    """
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else INTERRUPTED


def launch_processes(number: int) -> None:
    """Run this command line in `number` processes and wait; exit with their status if it is not 0.

    The first request to stop is passed on to all processes, the second kills them. If a process
    fails, the others are killed and TrainingError names its rank.
    """

    def stop(count: int) -> None:
        for process in processes:
            if process.poll() is None:
                process.terminate() if count == 1 else process.kill()

    processes: list[subprocess.Popen[bytes]] = []
    with count_interrupts(stop) as interrupts:
        try:
            shared = _environment(number)
            for rank in range(number):
                processes.append(
                    subprocess.Popen(
                        [*python_module("minimind"), *sys.argv[1:]],
                        env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.PIPE,
                        start_new_session=True,  # Ctrl-C reaches only the parent
                    )
                )
            failed = _wait(processes)
            statuses = [process.poll() for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    stops = interrupts.count
    if stops > 1 or (stops and failed is not None and statuses[failed] == -signal.SIGTERM):
        raise KeyboardInterrupt  # killed, or stopped before training began
    if failed is not None:
        if failed == 0 and statuses[0] == 1:  # rank 0 has printed its error
            raise typer.Exit(1)
        raise TrainingError(
            f"process {failed} of 0-{number - 1} {_describe_exit(statuses[failed])}; the others "
            f"were stopped. Run {same_command()} again to resume from the last checkpoint"
        )
    if INTERRUPTED in statuses:
        raise typer.Exit(INTERRUPTED)


def _environment(number: int) -> dict[str, str]:
    """Return the variables that torchrun would set for all processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, num_cores() // number)
    return {
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        EXIT_WITH_PARENT_VARIABLE: "1",
    }


def _wait(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all processes have exited or one has failed; return the failed rank."""
    while True:
        statuses = [process.poll() for process in processes]
        failed = [i for i, s in enumerate(statuses) if s not in (None, 0, INTERRUPTED)]
        if failed:
            # Negative statuses first: a killed process makes the others fail, not vice versa.
            return min(failed, key=lambda i: statuses[i] or 0)
        if None not in statuses:
            return None
        time.sleep(_POLL_S)


def _describe_exit(status: int | None) -> str:
    if status is not None and status < 0:
        cause = " (often because memory ran out)" * (status == -signal.SIGKILL)
        return f"was ended by {signal.Signals(-status).name}{cause}"
    return f"exited with status {status}; its error is above"


def exit_with_parent() -> None:
    """Exit as soon as the parent has died, in a process that it started for training."""
    if EXIT_WITH_PARENT_VARIABLE in os.environ:
        exit_when_stdin_closes()
