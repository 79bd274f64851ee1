"""Many runs, each a process of its own: a run that dies takes no other with it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from minimind.config import dump_recipe
from minimind.config.settings import Recipe
from minimind.errors import UsageError
from minimind.signals import count_interrupts
from minimind.training.run import is_finished

_POLL_S = 0.25
_TAIL_BYTES = 4096


@dataclass(frozen=True)
class Planned:
    """A run to be made: `recipe.out` is its directory, `log` is where its words go."""

    name: str
    recipe: Recipe
    log: Path

    @property
    def run(self) -> Path:
        return Path(self.recipe.out or "")


@dataclass
class Outcomes:
    """How runs ended: the names of those that are finished, and why others are not."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


class Watcher:
    """Is told what happens. Shows nothing; the command line draws it."""

    def started(self, place: int, planned: Planned) -> None:
        """A run begins on the device of that place."""

    def progress(self, place: int, planned: Planned, line: dict[str, Any]) -> None:
        """The newest line of its metrics."""

    def ended(self, place: int, planned: Planned, failure: str | None) -> None:
        """It has ended, well if there is no failure."""


@dataclass
class _Running:
    planned: Planned
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    asked: int = 0

    def ask_to_stop(self, times: int) -> None:
        """Hand on what is new of so many requests: the first asks, the next ends it."""
        if times > self.asked:
            self.process.terminate() if times == 1 else self.process.kill()
            self.asked = times


def device_settings(devices: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """(recipe's device, environment) of each process.

    A numbered GPU is made the only one that its process sees, so that a run has the same recipe
    on whichever of them it goes on. Raises UsageError when devices are of several kinds.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    settings: list[tuple[str, dict[str, str]]] = []
    for device in devices:
        kind, _, number = device.partition(":")
        if kind != "cuda" or not number.isdecimal():
            settings.append((device, {}))
            continue
        seen = visible.split(",") if visible else None
        if seen and int(number) >= len(seen):
            raise UsageError(f"--devices {device}: CUDA_VISIBLE_DEVICES leaves only {visible}")
        one = seen[int(number)] if seen else number
        settings.append(("cuda", {"CUDA_VISIBLE_DEVICES": one}))
    if len({device for device, _ in settings}) > 1:
        raise UsageError(
            f"--devices {','.join(devices)}: devices of one kind are meant, since a run goes on "
            "only on the kind it began on"
        )
    return settings


def run_all(
    planned: Sequence[Planned],
    environments: Sequence[dict[str, str]],
    *,
    fresh: bool = False,
    watcher: Watcher,
) -> Outcomes:
    """Make the runs, as many at once as there are environments, each in a process.

    Those that are finished are left as they are, but with `fresh`. Ctrl-C or SIGTERM lets every
    running one save and stop; a second one kills them.
    """
    outcomes, waiting = Outcomes(), list(planned)
    running: dict[int, _Running] = {}
    with count_interrupts() as interrupts:
        while waiting or running:
            for place, environment in enumerate(environments):
                while waiting and place not in running and not interrupts.count:
                    one = waiting.pop(0)
                    if not fresh and is_finished(one.run, one.recipe):
                        outcomes.finished.append(one.name)
                        watcher.ended(place, one, None)
                        continue
                    running[place] = _start(one, environment, fresh)
                    watcher.started(place, one)
            for place, current in list(running.items()):
                current.ask_to_stop(interrupts.count)
                if (status := current.process.poll()) is None:
                    if line := _last_line(current.planned.run / "metrics.jsonl"):
                        watcher.progress(place, current.planned, line)
                    continue
                del running[place]
                current.log.close()
                failure = _failure(current.planned, status, interrupts.count > 0)
                if failure is None:
                    outcomes.finished.append(current.planned.name)
                else:
                    outcomes.failed[current.planned.name] = failure
                watcher.ended(place, current.planned, failure)
            if interrupts.count and not running:
                break
            if running:
                time.sleep(_POLL_S)
        outcomes.stopped = interrupts.count > 0
    for one in waiting:
        outcomes.failed[one.name] = "not begun"
    return outcomes


def _start(planned: Planned, environment: dict[str, str], fresh: bool) -> _Running:
    planned.log.parent.mkdir(parents=True, exist_ok=True)
    recipe = planned.log.with_suffix(".toml")
    recipe.write_text(dump_recipe(planned.recipe), encoding="utf-8")
    log = planned.log.open("wb")
    command = [sys.executable, "-m", "minimind", "train", str(recipe), *["--fresh"] * fresh]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"COLUMNS": "120"} | environment,
        start_new_session=True,  # Ctrl-C reaches us alone, and we ask each once
    )
    return _Running(planned, process, log)


def _failure(planned: Planned, status: int, stopping: bool) -> str | None:
    """Why a run has failed; None if it has not."""
    if status == 0:
        return None
    if stopping and status in (130, -signal.SIGTERM, -signal.SIGKILL):
        return "stopped; the same command goes on from there"
    lines = planned.log.read_text("utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ")
    if status < 0:
        return f"killed by {signal.Signals(-status).name}; see {planned.log}"
    last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    return f"exit status {status}: {last} (see {planned.log})"


def _last_line(metrics: Path) -> dict[str, Any] | None:
    """The newest whole line of training."""
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
