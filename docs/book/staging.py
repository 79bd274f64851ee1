"""A chapter as a page of the site: figures inline, formulas as MathML, the interactive piece."""

import re
import shutil
from functools import cache
from pathlib import Path

from docs.book.chapters import DOCS, FACT, FORMULA, IMAGE, PIECE, Chapter, chapters

_CODE = re.compile(r"(^ *```.*?^ *```$|`[^`\n]+`)", re.M | re.S)
_STYLE = re.compile(r"<style>:root.*?</style>", re.S)
_OPEN = {
    "en": "[Open this chapter as a Jupyter notebook]({notebook}) · [script]({folder}/chapter.py) · "
    "[solutions]({folder}/solutions.py)",
    "zh": "[在 Jupyter 笔记本中打开本章]({notebook}) · [脚本]({folder}/chapter.py) · "
    "[参考解答]({folder}/solutions.py)",
}


def chapter_of(page: Path) -> Chapter | None:
    """Return the chapter that a page of the docs is, if it is one."""
    is_chapter = page.parent.name == "book" and page.stem in {
        c.stem for c in chapters()
    }
    return Chapter(page.stem) if is_chapter else None


def site_page(chapter: Chapter, lang: str, folder: Path) -> str:
    """Return the page for the site, and copy the script of its piece into `folder`."""
    text = FACT.sub(r"\1", chapter.text(lang))
    text = "".join(
        piece if number % 2 else FORMULA.sub(_to_mathml, piece)
        for number, piece in enumerate(_CODE.split(text))
    )
    text = IMAGE.sub(lambda match: _inline_figure(match, chapter.page(lang)), text)
    shutil.copyfile(chapter.folder / "piece.js", folder / f"{chapter.stem}.js")
    text = PIECE.sub(lambda match: piece_html(chapter, lang, match), text)
    line = _OPEN[lang].format(
        notebook=f"../../../notebooks/book/{lang}/{chapter.stem}.ipynb",
        folder=f"../../book/{chapter.stem}",
    )
    title, _, rest = text.partition("\n\n")
    return f"{title}\n\n{line}\n\n{rest}"


def piece_html(chapter: Chapter, lang: str, match: re.Match[str]) -> str:
    """Return the element of an interactive piece, its data and the call of its function.

    `piece.js` defines `bookPiece(root, data, lang)`, which replaces the text within the element.
    """
    data = chapter.outputs / "piece.json"
    content = (
        data.read_text("utf-8").replace("\n", "") if data.is_file() else "null"
    )
    content = content.replace("</", "<\\/")
    return (
        f'<div class="piece" id="{match[1]}"><p>{match[2]}</p></div>\n\n'
        f'<script src="{chapter.stem}.js"></script>\n\n'
        f'<script>bookPiece(document.getElementById("{match[1]}"), {content}, "{lang}")</script>'
    )


def _inline_figure(match: re.Match[str], page: Path) -> str:
    """Return an SVG image as an element, so that it takes the colours of the page."""
    alt, target = match.groups()
    file = (page.parent / target).resolve()
    if file.suffix != ".svg" or DOCS / "book" not in file.parents:
        return match[0]
    drawing = _STYLE.sub("", file.read_text("utf-8"))
    drawing = re.sub(r' (width|height)="[\d.]+pt"', "", drawing, count=2)
    label = alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    drawing = drawing.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return f'<div class="figure">{" ".join(drawing.split())}</div>'


@cache
def _mathml(latex: str, display: str) -> str:
    from latex2mathml.converter import convert

    return str(convert(latex, display=display)).replace("\\_", "_")


def _to_mathml(match: re.Match[str]) -> str:
    if match[1]:
        return f'<div class="formula">{_mathml(match[1].strip(), "block")}</div>'
    # Markdown takes <math> at the start of a line for a block; <span> stays in the paragraph.
    return f"<span>{_mathml(match[2], 'inline')}</span>"
