"""Run many recipes, each in its own process, so that one that crashes affects no other."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from minimind.config import dump_recipe
from minimind.config.settings import Recipe
from minimind.environment import EXIT_WITH_PARENT_VARIABLE, num_cores, python_module
from minimind.errors import UsageError, same_command
from minimind.signals import count_interrupts
from minimind.training.run import is_finished

_POLL_S = 0.25
_TAIL_BYTES = 4096


@dataclass(frozen=True)
class PlannedRun:
    """A run to start: `recipe.out` is its directory, `log` receives its output."""

    name: str
    recipe: Recipe
    log: Path

    @property
    def run(self) -> Path:
        return Path(self.recipe.out or "")


@dataclass
class Outcomes:
    """Outcomes of the runs: names of finished ones, and the reason why each other run failed."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


class Watcher:
    """Observer of a sweep that ignores all events. Subclasses display them."""

    def started(self, slot: int, planned: PlannedRun) -> None:
        """Called when a run has started on the device of this slot."""

    def progress(self, slot: int, planned: PlannedRun, line: dict[str, Any]) -> None:
        """Called when the run has written a line of training metrics."""

    def ended(self, slot: int, planned: PlannedRun, failure: str | None) -> None:
        """Called when the run has ended. failure: why it is not finished; None if it is."""


@dataclass
class _RunProcess:
    planned: PlannedRun
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    stop_requests: int = 0

    def close(self) -> None:
        """Close the files of a process that has ended."""
        assert self.process.stdin
        self.process.stdin.close()
        self.log.close()

    def forward_stop_requests(self, count: int) -> None:
        """Terminate the process on the first stop request, kill it on the next."""
        if count > self.stop_requests:
            self.process.terminate() if count == 1 else self.process.kill()
            self.stop_requests = count


def device_settings(devices: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Return (the recipe's device, environment variables) for each slot.

    With a device such as cuda:1, the process sees only that GPU and the recipe's device is cuda, so
    that the run can be resumed on another GPU. Several slots on the CPU share its cores. Raises
    UsageError for devices of different kinds.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    on_cpu = sum(device == "cpu" for device in devices)
    shared = {} if on_cpu < 2 else {"OMP_NUM_THREADS": str(max(1, num_cores() // on_cpu))}
    settings: list[tuple[str, dict[str, str]]] = []
    for device in devices:
        kind, _, number = device.partition(":")
        if kind != "cuda" or not number.isdecimal():
            own = shared if device == "cpu" and "OMP_NUM_THREADS" not in os.environ else {}
            settings.append((device, own))
            continue
        available = visible.split(",") if visible else None
        if available and int(number) >= len(available):
            raise UsageError(f"--devices {device}: CUDA_VISIBLE_DEVICES allows only {visible}")
        gpu = available[int(number)] if available else number
        settings.append(("cuda", {"CUDA_VISIBLE_DEVICES": gpu}))
    if len({device for device, _ in settings}) > 1:
        raise UsageError(
            f"--devices {','.join(devices)}: all devices must be of one kind, because a run "
            "resumes only on the kind of device it began on"
        )
    return settings


def run_all(
    planned: Sequence[PlannedRun],
    environments: Sequence[dict[str, str]],
    *,
    fresh: bool = False,
    watcher: Watcher,
) -> Outcomes:
    """Execute the runs in processes of their own, one per slot at a time.

    environments: the environment variables of each slot. Finished runs are skipped unless `fresh`.
    On Ctrl-C or SIGTERM, the running ones save a checkpoint and stop; a second one kills them.
    """
    outcomes, pending = Outcomes(), list(planned)
    running: dict[int, _RunProcess] = {}
    with count_interrupts() as interrupts:
        try:
            while pending or running:
                for slot, environment in enumerate(environments):
                    while pending and slot not in running and not interrupts.count:
                        run = pending.pop(0)
                        if not fresh and is_finished(run.run, run.recipe):
                            outcomes.finished.append(run.name)
                            watcher.ended(slot, run, None)
                            continue
                        running[slot] = _start(run, environment, fresh)
                        watcher.started(slot, run)
                for slot, current in list(running.items()):
                    current.forward_stop_requests(interrupts.count)
                    if (status := current.process.poll()) is None:
                        if line := _last_line(current.planned.run / "metrics.jsonl"):
                            watcher.progress(slot, current.planned, line)
                        continue
                    del running[slot]
                    current.close()
                    failure = _failure_reason(current.planned, status, interrupts.count > 0)
                    if failure is None:
                        outcomes.finished.append(current.planned.name)
                    else:
                        outcomes.failed[current.planned.name] = failure
                    watcher.ended(slot, current.planned, failure)
                if interrupts.count and not running:
                    break
                if running:
                    time.sleep(_POLL_S)
        finally:  # an error of the watcher, or a full disk, must not leave processes behind
            for current in running.values():
                current.process.kill()
                current.process.wait()
                current.close()
        outcomes.stopped = interrupts.count > 0
    for run in pending:
        outcomes.failed[run.name] = "not started"
    return outcomes


def _start(planned: PlannedRun, environment: dict[str, str], fresh: bool) -> _RunProcess:
    planned.log.parent.mkdir(parents=True, exist_ok=True)
    recipe = planned.log.with_suffix(".toml")
    recipe.write_text(dump_recipe(planned.recipe), encoding="utf-8")
    log = planned.log.open("wb")
    command = [*python_module("minimind"), "train", str(recipe), *["--fresh"] * fresh]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"COLUMNS": "120", EXIT_WITH_PARENT_VARIABLE: "1"} | environment,
        start_new_session=True,  # so that Ctrl-C reaches only this process, which forwards it
    )
    return _RunProcess(planned, process, log)


def _failure_reason(planned: PlannedRun, status: int, stopping: bool) -> str | None:
    """Return why a run has failed, or None if it is finished."""
    if status == 0:
        return None
    # On Windows, terminating a process ends it with status 1 and without a checkpoint.
    if stopping and status in ((1,) if os.name == "nt" else (130, -signal.SIGTERM, -9)):
        return f"stopped; {same_command()} resumes it"
    lines = planned.log.read_text("utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ")
    if status < 0:
        return f"killed by {signal.Signals(-status).name}; see {planned.log}"
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    return f"exit status {status}: {last} (see {planned.log})"


def _last_line(metrics: Path) -> dict[str, Any] | None:
    """Return the newest complete line of training metrics; None if there is none."""
    try:
        with metrics.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = stream.read().split(b"\n")[:-1]
    except OSError:
        return None
    for text in reversed(lines):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line.get("kind") == "train":
            return dict(line)
    return None
