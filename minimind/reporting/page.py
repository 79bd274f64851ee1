"""The content of a report, independent of its format: sections of tables, plots and texts."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal


@dataclass(frozen=True)
class Bar:
    """A fraction from 0 to 1, drawn as a bar."""

    fraction: float


Cell = str | bool | Bar  # a bool is a mark: right or wrong


@dataclass(frozen=True)
class Table:
    """A table. numbers: the indices of right-aligned columns.

    In a table of kind "texts" all columns have the same width; a narrow screen stacks the cells.
    """

    type: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: Collection[int] = ()
    kind: Literal["metrics", "texts"] = "metrics"

    def columns_without_bars(self) -> list[int]:
        """Return the indices of the columns that text can show."""
        return [
            column
            for column in range(len(self.head))
            if not any(isinstance(row[column], Bar) for row in self.rows)
        ]


@dataclass(frozen=True)
class Plots:
    """Plots side by side, as (title, SVG). wide: leave room for long legends."""

    type: ClassVar[str] = "plots"
    plots: Sequence[tuple[str, str]]
    wide: bool = False


@dataclass(frozen=True)
class Title:
    """A subheading within a section."""

    type: ClassVar[str] = "title"
    text: str


@dataclass(frozen=True)
class Problems:
    """A list of problems with the inputs."""

    type: ClassVar[str] = "problems"
    lines: Sequence[str]


@dataclass(frozen=True)
class Folded:
    """A table or a text that is collapsed at first."""

    type: ClassVar[str] = "folded"
    summary: str
    content: Table | str


Block = Table | Plots | Title | Problems | Folded


@dataclass(frozen=True)
class Section:
    """A heading, a short explanation, and blocks."""

    title: str
    about: str
    blocks: Sequence[Block]


@dataclass
class Page:
    """A report. cards: the most important metrics, by name."""

    title: str
    lead: str
    cards: Mapping[str, str]
    sections: list[Section] = field(default_factory=list)

    def add(self, title: str, about: str, *blocks: Block | None) -> None:
        """Add a section, unless all of its blocks are empty."""
        nonempty = [block for block in blocks if block is not None and not _is_empty(block)]
        if nonempty:
            self.sections.append(Section(title, about, nonempty))


def _is_empty(block: Block) -> bool:
    if isinstance(block, Table):
        return not block.rows
    if isinstance(block, Plots):
        return not block.plots
    return isinstance(block, Problems) and not block.lines
