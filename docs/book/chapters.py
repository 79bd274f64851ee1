"""Parts of a chapter: its pages, its script, its solutions and what the script has written.

A script is divided into cells by the markers of included regions. Cells are shown in the pages, run
in the notebooks and print into `outputs/NAME.txt`. Code between the cells is not shown; it defines

    facts                        dict of values that the prose states: `3.81<!--=bits-->`;
                                 (english, chinese) where they differ
    figure_NAME(figure, say)     draws on a matplotlib figure: `outputs/NAME.en.svg` and `.zh.svg`
    table_NAME(say)              returns rows, the first of them the head: `outputs/NAME.en.md` …
    piece                        data for the interactive piece, as JSON

where `say(english, chinese)` chooses the language.
"""

import re
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LANGUAGES = ("en", "zh")
INCLUDE = re.compile(r'--8<-- "([^":]+)(?::([^"]+))?"')
FACT = re.compile(r"(-?\d[\d,.]*(?:\s?%)?)<!--=(\w+)-->")
PIECE = re.compile(
    r'^<div class="piece" id="([\w-]+)">\n(.*?)\n</div>$', re.M | re.S
)
EXERCISE = re.compile(r'^<details markdown="1">\n(.*?)^</details>$', re.M | re.S)
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
FORMULA = re.compile(
    r"\$\$(.+?)\$\$|(?<![\\$\w])\$(?=\S)([^$\n]+?)(?<=\S)\$(?![\w$])", re.S
)
_MARKER = re.compile(r"^[ \t]*# --8<-- \[(start|end):([^\]]+)\]\n", re.M)


@dataclass(frozen=True)
class Chapter:
    """One chapter, by the stem of its files: `01-language-model`."""

    stem: str
    root: Path = ROOT

    @property
    def folder(self) -> Path:
        return self.root / "docs" / "book" / self.stem

    @property
    def outputs(self) -> Path:
        return self.folder / "outputs"

    @property
    def number(self) -> int:
        return int(self.stem.partition("-")[0])

    def page(self, lang: str) -> Path:
        return self.root / "docs" / lang / "book" / f"{self.stem}.md"

    def notebook(self, lang: str) -> Path:
        return self.root / "notebooks" / "book" / lang / f"{self.stem}.ipynb"

    def text(self, lang: str) -> str:
        return self.page(lang).read_text("utf-8")

    def path_in_repository(self, name: str) -> str:
        """Return how an include names a file of this chapter's folder."""
        return f"docs/book/{self.stem}/{name}"


def chapters() -> list[Chapter]:
    """Return all chapters in order."""
    return [
        Chapter(path.stem)
        for path in sorted((DOCS / "en" / "book").glob("[0-9][0-9]-*.md"))
    ]


@cache
def cells(script: Path) -> tuple[tuple[str | None, str, int], ...]:
    """Split a script at its markers into (name of the cell or None, source, first line)."""
    source = script.read_text("utf-8")
    pieces: list[tuple[str | None, str, int]] = []
    name, at = None, 0
    for marker in _MARKER.finditer(source):
        pieces.append(
            (name, source[at : marker.start()], source.count("\n", 0, at) + 1)
        )
        name, at = (marker[2] if marker[1] == "start" else None), marker.end()
    pieces.append((name, source[at:], source.count("\n", 0, at) + 1))
    return tuple(piece for piece in pieces if piece[1].strip())


def cell_names(script: Path) -> list[str]:
    """Return the names of the cells of a script, in order."""
    return [name for name, _, _ in cells(script) if name]


def read_region(file: Path, region: str | None) -> str:
    """Return a file, or one region of it without its indentation and its markers.

    Empty if it does not exist, which `docs.build` reports.
    """
    text = file.read_text("utf-8") if file.is_file() else ""
    if region:
        start, end = f"--8<-- [start:{region}]", f"--8<-- [end:{region}]"
        text = (
            text.partition(start)[2]
            .partition("\n")[2]
            .partition(end)[0]
            .rpartition("\n")[0]
        )
    return textwrap.dedent(_MARKER.sub("", text + "\n")).strip("\n")


def solutions(chapter: Chapter, lang: str = "en") -> list[list[str]]:
    """Return the regions of `solutions.py` that the solution of each exercise of a page shows."""
    name = chapter.path_in_repository("solutions.py")
    return [
        [region for file, region in INCLUDE.findall(block) if file == name]
        for block in EXERCISE.findall(chapter.text(lang))
    ]
