"""What a report is made of, and how it becomes a self-contained HTML page or Markdown."""

import html
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from minimind.files import write_atomically
from minimind.reporting.plots import as_file

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8882; --good: #2a9d5c; --bad: #d9583b; }
* { box-sizing: border-box; }
body { font: 16px/1.6 system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC",
       "Noto Sans SC", sans-serif;
       max-width: 66rem; margin: 0 auto; padding: 1rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.8rem; margin: 1rem 0 .2rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .2rem; }
p { margin: 0 0 .9rem; max-width: 48rem; }
.faint { opacity: .75; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .8rem;
         margin: 1.2rem 0; }
.card { border: 1px solid var(--line); border-radius: .6rem; padding: .6rem .9rem; }
.card b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line);
         vertical-align: top; }
td { white-space: pre-wrap; }
th { font-weight: 600; }
.figures th, .figures td { white-space: nowrap; }
.figures td:first-child { white-space: normal; min-width: 11rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr));
         gap: 1rem; }
.wide { grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
figure { margin: 0; max-width: 38rem; border: 1px solid var(--line); border-radius: .6rem;
         padding: .5rem; }
figcaption { font-weight: 600; text-align: center; }
figure svg { display: block; width: 100%; height: auto; }
.bar { background: var(--soft); border-radius: .3rem; height: .9rem; min-width: 5rem;
       margin-top: .35rem; }
.bar i { display: block; height: 100%; border-radius: .3rem; background: var(--good); }
.right { color: var(--good); } .wrong { color: var(--bad); }
.problems { border: 1px solid var(--bad); border-radius: .6rem; padding: .6rem .9rem .6rem 2rem; }
details { border: 1px solid var(--line); border-radius: .6rem; padding: .4rem .9rem;
          margin: .6rem 0; }
summary { cursor: pointer; }
pre { overflow-x: auto; font-size: .85rem; white-space: pre-wrap; }
.texts { table-layout: fixed; }
.texts th.number { width: 5rem; } .texts th:empty { width: 2.5rem; }
@media (max-width: 42rem) {
  .texts, .texts tbody, .texts tr, .texts td { display: block; width: auto; }
  .texts tr:first-child { display: none; }
  .texts tr { border-bottom: 1px solid var(--line); padding: .5rem 0; }
  .texts td { border: 0; padding: .1rem 0; text-align: left; }
  .texts td::before { content: attr(data-name); display: block; font-size: .78rem; opacity: .7; }
}
"""
_MARKS = {True: "✓", False: "✗"}


@dataclass(frozen=True)
class Bar:
    """A share from 0 to 1, drawn as a bar."""

    share: float


Cell = str | bool | Bar  # a bool is a mark: right or wrong


@dataclass(frozen=True)
class Table:
    """`numbers` are the columns set right.

    Of kind "texts" its columns are equally wide, and on a phone each cell has a line of its own.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: Collection[int] = ()
    kind: Literal["figures", "texts"] = "figures"


@dataclass(frozen=True)
class Plots:
    """(title, drawing) side by side; wide ones have a long legend."""

    plots: Sequence[tuple[str, str]]
    wide: bool = False


@dataclass(frozen=True)
class Title:
    """Of a part of a section."""

    text: str


@dataclass(frozen=True)
class Problems:
    """What is wrong, a line each."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Folded:
    """Shown when asked for: a table, or text as it is."""

    summary: str
    content: Table | str


Block = Table | Plots | Title | Problems | Folded


@dataclass(frozen=True)
class Section:
    """One heading, what it is about, and what it shows."""

    title: str
    about: str
    blocks: Sequence[Block]


@dataclass
class Page:
    """A report. Sections without blocks are left out."""

    title: str
    lead: str
    cards: Mapping[str, str]
    sections: list[Section] = field(default_factory=list)

    def add(self, title: str, about: str, *blocks: Block | None) -> None:
        """A section, if there is anything to show in it."""
        shown = [block for block in blocks if block is not None and not _is_empty(block)]
        if shown:
            self.sections.append(Section(title, about, shown))


def _is_empty(block: Block) -> bool:
    if isinstance(block, Table):
        return not block.rows
    if isinstance(block, Plots):
        return not block.plots
    return isinstance(block, Problems) and not block.lines


def to_html(page: Page) -> str:
    """One page that needs nothing from elsewhere."""
    figures = "".join(
        f"<div class=card>{_text(name)}<b>{_text(value)}</b></div>"
        for name, value in page.cards.items()
    )
    body = "\n".join(
        f"<h2>{_text(section.title)}</h2><p class=faint>{_text(section.about)}</p>"
        + "".join(map(_block, section.blocks))
        for section in page.sections
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escaped(page.title)}</title><style>{_STYLE}</style><h1>{_text(page.title)}</h1>"
        f"<p class=faint>{_text(page.lead)}</p><div class=cards>{figures}</div>{body}</html>\n"
    )


def write(page: Page, path: Path) -> None:
    """The page at `path`, Markdown beside it, and the drawings of that in a folder."""
    write_atomically(path, to_html(page))
    drawings: dict[str, str] = {}
    folder = path.with_name(f"{path.stem}-plots")
    markdown = to_markdown(page, folder.name, drawings)
    write_atomically(path.with_suffix(".md"), markdown)
    if folder.is_dir():
        for old in folder.glob("[0-9][0-9][0-9].svg"):
            old.unlink()
    for name, drawing in drawings.items():
        write_atomically(folder / name, as_file(drawing))


def to_markdown(page: Page, folder: str, drawings: dict[str, str]) -> str:
    """The same as Markdown; the drawings that it shows from `folder` are put into `drawings`."""
    parts = [f"# {_plain(page.title)}", _plain(page.lead)]
    if page.cards:
        parts.append(_markdown_table(Table(["", ""], list(page.cards.items()), (1,))))
    for section in page.sections:
        parts += [f"## {_plain(section.title)}", _plain(section.about)]
        for block in section.blocks:
            if isinstance(block, Table):
                parts.append(_markdown_table(block))
            elif isinstance(block, Title):
                parts.append(f"### {_plain(block.text)}")
            elif isinstance(block, Problems):
                parts.append("\n".join(f"- {_plain(line)}" for line in block.lines))
            elif isinstance(block, Folded):
                parts.append(f"**{_plain(block.summary)}**")
                content = block.content
                if isinstance(content, Table):
                    parts.append(_markdown_table(content))
                else:
                    parts.append(_fenced(content))
            else:
                for title, drawing in block.plots:
                    name = f"{len(drawings) + 1:03}.svg"
                    drawings[name] = drawing
                    parts.append(f"![{_plain(title)}]({folder}/{name})")
    return "\n\n".join(parts) + "\n"


def _text(value: object) -> str:
    """Text that stays text in a page, marked where it is Chinese, for the page is in English."""
    text = _escaped(value)
    return f"<span lang=zh-Hans>{text}</span>" if re.search("[\u4e00-\u9fff]", text) else text


def _escaped(value: object) -> str:
    """Text for an attribute or a title; control characters, which HTML forbids, as �."""
    return html.escape(_printable(str(value)))


def _printable(text: str) -> str:
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Title):
        return f"<h3>{_text(block.text)}</h3>"
    if isinstance(block, Problems):
        lines = "".join(f"<li>{_text(line)}</li>" for line in block.lines)
        return f"<ul class=problems>{lines}</ul>"
    if isinstance(block, Folded):
        content = block.content
        inside = _table(content) if isinstance(content, Table) else f"<pre>{_text(content)}</pre>"
        return f"<details><summary>{_text(block.summary)}</summary>{inside}</details>"
    figures = "".join(
        f"<figure><figcaption>{_text(title)}</figcaption>{drawing}</figure>"
        for title, drawing in block.plots
    )
    return f'<div class="plots{" wide" * block.wide}">{figures}</div>'


def _table(table: Table) -> str:
    marks = [" class=number" * (i in table.numbers) for i in range(len(table.head))]
    names = [_escaped(name) for name in table.head]
    lines = ["".join(f"<th{m}>{_text(n)}</th>" for m, n in zip(marks, table.head, strict=True))]
    lines += [
        "".join(
            f'<td{m} data-name="{n}">{_cell(c)}</td>'
            for m, n, c in zip(marks, names, row, strict=True)
        )
        for row in table.rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class=scroll><table class={table.kind}>{body}</table></div>"


def _cell(cell: Cell) -> str:
    if isinstance(cell, Bar):
        return f"<div class=bar><i style='width:{cell.share:.0%}'></i></div>"
    if isinstance(cell, bool):
        return f"<b class={'right' if cell else 'wrong'}>{_MARKS[cell]}</b>"
    return _text(cell)


def _plain(value: object) -> str:
    """Text that stays text in Markdown, on one line."""
    text = html.escape(_printable(str(value)), quote=False)
    return re.sub(r"\s*\n\s*", "<br>", re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", text).strip())


def _fenced(text: str) -> str:
    """Text as it is, between fences that are longer than any within."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{_printable(text).rstrip()}\n{fence}"


def _markdown_table(table: Table) -> str:
    columns = [i for i in range(len(table.head)) if not _holds_bars(table, i)]
    lines = ["| " + " | ".join(_plain(table.head[i]) for i in columns) + " |"]
    lines.append("|" + "|".join("---:" if i in table.numbers else "---" for i in columns) + "|")
    for row in table.rows:
        lines.append("| " + " | ".join(_markdown_cell(row[i]) for i in columns) + " |")
    return "\n".join(lines)


def _holds_bars(table: Table, column: int) -> bool:
    return any(isinstance(row[column], Bar) for row in table.rows)


def _markdown_cell(cell: Cell) -> str:
    if isinstance(cell, bool):
        return _MARKS[cell]
    return "" if isinstance(cell, Bar) else _plain(cell)
