"""Console output of the commands: lines, tables and progress bars."""

import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from minimind.errors import shell_words
from minimind.progress import RichReporter, console, make_progress
from minimind.training.reporter import pluralize
from minimind.units import format_memory, format_number, format_size

__all__ = [
    "RichReporter",
    "console",
    "format_memory",
    "format_number",
    "format_size",
    "make_progress",
    "pluralize",
]


def say(text: str) -> None:
    """Print text without wrapping or markup."""
    console.print(text, soft_wrap=True)


def heading(number: str, title: str) -> None:
    """Print the heading of a step. number: such as 2/6."""
    console.print(Text.assemble((f"\n{number} ", "dim"), (title, "bold")))


def show(renderable: RenderableType) -> None:
    """Print a table or another rich renderable."""
    console.print(renderable)


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], numbers: int = 0
) -> Table:
    """Return a table whose last `numbers` columns are right-aligned."""
    result = Table(title=Text(title), title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        right = index >= len(columns) - numbers
        result.add_column(Text(column), justify="right" if right else "left", overflow="fold")
    for row in rows:
        result.add_row(*(Text(format_number(value)) for value in row))
    return result


def command(*words: str | Path) -> str:
    """Return a `minimind` command line to paste; it works even if `minimind` is not on PATH."""
    executable = Path(sys.executable).with_name("minimind")
    on_path = shutil.which("minimind")
    if (on_path and Path(on_path).resolve() == executable.resolve()) or not executable.exists():
        return shell_words("minimind", *words)
    if Path.cwd() in executable.parents:
        executable = executable.relative_to(Path.cwd())
    return shell_words(executable, *words)


def show_metrics(title: str, metrics: Mapping[str, Any]) -> None:
    """Print the scalar metrics of a summary as a table, without nested metrics."""
    rows: list[tuple[str, object]] = []
    for name, value in metrics.items():
        if name == "peak_memory_bytes" and value is not None:
            name, value = "peak memory", format_memory(value)
        if not isinstance(value, Mapping | list):
            rows.append((name.replace("_", " "), value))
    show(table(title, ["metric", "value"], rows, numbers=1))
