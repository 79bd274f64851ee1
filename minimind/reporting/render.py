"""Render pages as self-contained HTML and as Markdown, by the Jinja templates in `templates/`.

Both environments escape every expression that is not marked as safe. Only the SVG drawings of
`plots.py` are marked as safe.
"""

import html
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from minimind.files import write_atomically
from minimind.reporting.page import Page, Plots
from minimind.reporting.plots import as_file


def to_html(page: Page) -> str:
    """Render a self-contained HTML file."""
    return _HTML.get_template("page.html.jinja").render(page=page)


def to_markdown(page: Page, folder: str = "") -> str:
    """Render Markdown; its plots are the files in `folder` that `drawings_of` names."""
    text = _MARKDOWN.get_template("page.md.jinja").render(page=page, folder=Markup(folder))
    return text.strip("\n") + "\n"


def drawings_of(page: Page) -> dict[str, str]:
    """Return all SVG drawings of a page, by file name."""
    drawings = [
        drawing
        for section in page.sections
        for block in section.blocks
        if isinstance(block, Plots)
        for _, drawing in block.plots
    ]
    return {f"{number:03}.svg": drawing for number, drawing in enumerate(drawings, 1)}


def write_page(page: Page, path: Path) -> None:
    """Write HTML to `path`, Markdown next to it, and the drawings of the Markdown to a folder."""
    write_atomically(path, to_html(page))
    folder = path.with_name(f"{path.stem}-plots")
    write_atomically(path.with_suffix(".md"), to_markdown(page, quote(folder.name)))
    if folder.is_dir():
        for old in folder.glob("[0-9][0-9][0-9].svg"):
            old.unlink()
    for name, drawing in drawings_of(page).items():
        write_atomically(folder / name, as_file(drawing))


def _printable(value: object) -> str:
    """Replace control characters and surrogates, which HTML forbids, by U+FFFD."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", str(value))


def _escape_html(value: object) -> Markup:
    return value if isinstance(value, Markup) else Markup.escape(_printable(value))


def _escape_markdown(value: object) -> Markup:
    """Escape text so that Markdown shows it literally, on one line."""
    if isinstance(value, Markup):
        return value
    text = html.escape(_printable(value), quote=False)
    text = re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", text).strip()
    return Markup(re.sub(r"\s*\n\s*", "<br>", text))


def _fenced(text: str) -> Markup:
    """Return a Markdown code block; its fence is longer than any run of backticks in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}\n{_printable(text).rstrip()}\n{fence}")


def _is_chinese(text: object) -> bool:
    return bool(re.search("[\u4e00-\u9fff]", str(text)))


def _environment(finalize: Callable[[object], Markup]) -> Environment:
    environment = Environment(
        loader=PackageLoader("minimind.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=finalize,
    )
    environment.tests["chinese"] = _is_chinese
    environment.filters["fenced"] = _fenced
    return environment


_HTML = _environment(_escape_html)
_MARKDOWN = _environment(_escape_markdown)
