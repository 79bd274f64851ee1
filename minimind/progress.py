"""Progress bars and messages of long tasks, in a terminal or a notebook."""

import errno
import os
import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from minimind.training.reporter import Reporter
from minimind.units import format_number, format_size


class _Console(Console):
    """A console that discards its output once the pipe or terminal it writes to is closed."""

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:
            # A pipe without a reader, and a terminal that was closed.
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Text often comes from files and models, so none of it is interpreted as markup.
console = _Console(markup=False, highlight=False, emoji=False)


class _Count(ProgressColumn):
    """Completed units and their total, if it is known."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        total = "" if task.total is None else f"/{task.total:,.0f}"
        return Text(f"{task.completed:,.0f}{total}")


class _Rate(ProgressColumn):
    """Units per second, or seconds per unit for slow tasks."""

    def __init__(self, unit: str) -> None:
        super().__init__(Column(no_wrap=True))
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.speed
        if (
            task.finished and task.elapsed
        ):  # the last updates may come in a burst: average over the task
            speed = (task.completed - task.fields.get("before", 0)) / task.elapsed
        if not speed:  # not measured yet
            return Text("")
        if self._unit == "byte":
            return Text(f"{format_size(speed)}/s")
        if speed >= 1:
            return Text(f"{format_number(round(speed, 1))} {self._unit}s/s")
        return Text(f"{format_number(1 / speed)} s/{self._unit}")


# Of the updates that the rate is measured over: large models report a step every few minutes.
_RATE_PERIOD_S = 1800.0


def make_progress(unit: str) -> Progress:
    """Return a progress bar with rate and time left; `unit` is "byte" or a singular noun.

    Every task needs the field `note`, a short text that is shown at the end.
    """
    count = DownloadColumn(table_column=Column(no_wrap=True)) if unit == "byte" else _Count()
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None),
        count,
        _Rate(unit),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True)),
        console=console,
        expand=True,
        speed_estimate_period=_RATE_PERIOD_S,
    )


class RichReporter(Reporter):
    """Draw the progress of one task at a time and print messages."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def start(self, title: str, total: int, done: int = 0, unit: str = "step") -> None:
        self.stop()
        self._bar = make_progress(unit)
        self._task = self._bar.add_task(title, total=total, completed=done, before=done, note="")
        self._bar.start()

    def progress(self, done: int, total: int, note: str = "") -> None:
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, note=note)

    def stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        console.print(text, soft_wrap=True)
