"""Progress bars and messages of long tasks, in a terminal or a notebook."""

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

# Text often comes from files and models, so none of it is interpreted as markup.
console = Console(markup=False, highlight=False, emoji=False)


def format_number(value: object) -> str:
    """Format a value for people: 1,234,567 and 0.1235; floats keep four significant digits."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def format_size(num_bytes: float | None) -> str:
    """Format the size of a file: 950 bytes, 12.3 kB, 4.5 MB, 1.25 GB (1 kB = 1,000 bytes).

    None is an unknown size.
    """
    if num_bytes is None:
        return "unknown"
    if num_bytes < 1000:
        return f"{num_bytes:.0f} byte" + "s" * (num_bytes != 1)
    if num_bytes < 1e6:
        return f"{num_bytes / 1e3:,.1f} kB"
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:,.2f} GB"


def format_memory(num_bytes: int) -> str:
    """Format an amount of memory: 12 KB, 800 MB, 1.25 GB (1 KB = 1,024 bytes)."""
    if num_bytes < 1 << 20:
        return f"{num_bytes / (1 << 10):,.0f} KB"
    if num_bytes < 1 << 30:
        return f"{num_bytes / (1 << 20):,.0f} MB"
    return f"{num_bytes / (1 << 30):.2f} GB"


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
