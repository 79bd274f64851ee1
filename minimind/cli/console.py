"""What the verbs print with: one console, progress bars, tables, figures as JSON."""

import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from minimind.errors import shell_words
from minimind.files import write_atomically
from minimind.progress import RichReporter, console, make_progress
from minimind.progress import format_number as figure

__all__ = ["RichReporter", "console", "figure", "make_progress"]  # and what is defined here


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


def count(number: int, one: str, more: str) -> str:
    """How many there are, as one or as more of them are called."""
    return f"{number:,} {one if number == 1 else more}"


def command(*words: str | Path) -> str:
    """Return a `minimind` command that works when pasted, also if its folder is not on PATH."""
    here = Path(sys.executable).with_name("minimind")
    found = shutil.which("minimind")
    if (found and Path(found).resolve() == here.resolve()) or not here.exists():
        return shell_words("minimind", *words)
    folder = Path.cwd()
    return shell_words(here.relative_to(folder) if folder in here.parents else here, *words)


def show_metrics(title: str, metrics: Mapping[str, Any]) -> None:
    """Print the plain figures of a summary as a table; nested ones are for the JSON alone."""
    plain = [
        (name.replace("_", " "), value)
        for name, value in metrics.items()
        if not isinstance(value, Mapping | list)
    ]
    show(table(title, ["figure", "value"], plain, numbers=1))


def write_json(path: Path, metrics: Mapping[str, Any]) -> None:
    """Write figures for programs to read, making the folder if need be."""
    write_atomically(path, json.dumps(metrics, ensure_ascii=False, indent=1) + "\n")
