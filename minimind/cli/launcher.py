"""`--nproc`: one command line in several processes on this machine, which live and die together.

torchrun does the same, and more (several machines); the processes work alike under both.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import typer

from minimind.errors import TrainingError
from minimind.signals import count_interrupts

_WATCHED = "MINIMIND_WATCHED"  # set where standard input ends when the starting process does
_LOOK_EVERY_S = 0.05
INTERRUPTED = 130


def is_first_process() -> bool:
    """False in all but one of several processes: what one of them says need not be said again."""
    return os.environ.get("RANK", "0") == "0"


def is_one_of_several() -> bool:
    """Whether this process was started by torchrun, or by `run_workers`."""
    return "RANK" in os.environ


def stopped() -> int:
    """Exit status of a run that was asked to stop and has saved: that of any interrupted program.

    torchrun would take it for a failure, and bury under a page of text what the run has said.
    """
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else INTERRUPTED


def run_workers(number: int) -> None:
    """Run this command line in `number` processes, wait, and end as they do.

    When one of them fails the others are killed; TrainingError says which it was. The first
    SIGINT or SIGTERM is passed on to them, the second kills them.
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
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "minimind", *sys.argv[1:]],
                        env=os.environ | shared | own,
                        stdin=subprocess.PIPE,
                        start_new_session=True,  # Ctrl-C comes to this process alone
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
        raise KeyboardInterrupt  # before training, or not to be waited for
    if failed is not None:
        if failed == 0 and statuses[0] == 1:  # it has said why
            raise typer.Exit(1)
        raise TrainingError(
            f"process {failed} of 0-{number - 1} {_how(statuses[failed])}; the others were "
            "stopped. The same command goes on from the last checkpoint"
        )
    if INTERRUPTED in statuses:
        raise typer.Exit(INTERRUPTED)


def _environment(number: int) -> dict[str, str]:
    """What torchrun would set for all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // number)
    return {
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        _WATCHED: "1",
    }


def _wait(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """Until all have ended well or were asked to stop, or one has failed: which?"""
    while True:
        statuses = [process.poll() for process in processes]
        failed = [i for i, s in enumerate(statuses) if s not in (None, 0, INTERRUPTED)]
        if failed:
            return min(failed, key=lambda i: statuses[i] or 0)  # killed comes before gave up
        if None not in statuses:
            return None
        time.sleep(_LOOK_EVERY_S)


def _how(status: int | None) -> str:
    if status is not None and status < 0:
        short = " (the system does so when memory is short)" * (status == -signal.SIGKILL)
        return f"was ended by {signal.Signals(-status).name}{short}"
    return f"ended with exit status {status}; what it said is above"


def end_with_starter() -> None:
    """In a process that `run_workers` started: leave at once when the starting process dies."""
    if _WATCHED not in os.environ:
        return

    def watch() -> None:
        while os.read(0, 1):  # not through sys.stdin, whose lock would be held at the end
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
