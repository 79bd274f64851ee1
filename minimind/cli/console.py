"""What the verbs print with: one console, progress bars, tables, figures as JSON."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table
from rich.text import Text

from minimind.training.reporter import Reporter

# Text comes from files and models as often as from us, so nothing is read as markup.
console = Console(markup=False, highlight=False, emoji=False)


def say(text: str) -> None:
    """Print one line, or a few."""
    console.print(text, soft_wrap=True)


def heading(number: str, title: str) -> None:
    """Begin a part of long work: "2/6", "training the tokenizer"."""
    console.print(Text.assemble((f"\n{number} ", "dim"), (title, "bold")))


def show(renderable: RenderableType) -> None:
    """Print a table, or whatever else rich draws."""
    console.print(renderable)


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], numbers: int = 0
) -> Table:
    """A table; its last `numbers` columns are set to the right, as figures are."""
    drawn = Table(title=Text(title), title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        right = index >= len(columns) - numbers
        drawn.add_column(Text(column), justify="right" if right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(figure(value)) for value in row))
    return drawn


def figure(value: object) -> str:
    """A value as people read it: 1,234,567 and 0.1235; floats keep four figures."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def count(number: int, one: str, more: str) -> str:
    """How many there are, as one or as more of them are called."""
    return f"{number:,} {one if number == 1 else more}"


def show_figures(title: str, figures: Mapping[str, Any]) -> None:
    """Print the plain figures of a summary as a table; nested ones are for the JSON alone."""
    plain = [
        (name.replace("_", " "), value)
        for name, value in figures.items()
        if not isinstance(value, Mapping | list)
    ]
    show(table(title, ["figure", "value"], plain, numbers=1))


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """Write figures for programs to read, making the folder if need be."""
    from minimind.config.files import write_atomically  # imports pydantic

    write_atomically(path, json.dumps(figures, ensure_ascii=False, indent=1) + "\n")


class _Count(ProgressColumn):
    """How many of how many; the total is left out where nobody knows it."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        total = "" if task.total is None else f"/{task.total:,.0f}"
        return Text(f"{task.completed:,.0f}{total}")


class _Rate(ProgressColumn):
    """Units a second, or seconds a unit where that says more."""

    def __init__(self, unit: str) -> None:
        super().__init__(Column(no_wrap=True))
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.speed
        if task.finished and task.elapsed:  # of all of it: the last of it may have come in a burst
            speed = (task.completed - task.fields.get("before", 0)) / task.elapsed
        if not speed:
            return Text("")
        if speed >= 1:
            return Text(f"{figure(round(speed, 1))} {self._unit}s/s")
        return Text(f"{figure(1 / speed)} s/{self._unit}")


def make_progress(unit: str) -> Progress:
    """A progress bar with rate and time left; `unit` is "byte", or the singular of what counts.

    Tasks may carry a short `note` (a field), shown at the end.
    """
    in_bytes: list[ProgressColumn] = [
        DownloadColumn(table_column=Column(no_wrap=True)),
        TransferSpeedColumn(Column(no_wrap=True)),
    ]
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None),
        *(in_bytes if unit == "byte" else [_Count(), _Rate(unit)]),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True)),
        console=console,
        expand=True,
    )


class RichReporter(Reporter):
    """Draws one piece of work at a time."""

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
        say(text)
