"""Jupyter notebooks of the chapters, generated from the same pages and scripts.

Cells of the script become code cells, and so do the figures and the solutions. Tables are inserted
as text. Notebooks are stored without outputs.
"""

import ast
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from docs.book.chapters import (
    EXERCISE,
    FACT,
    IMAGE,
    INCLUDE,
    LANGUAGES,
    PIECE,
    Chapter,
    read_region,
)

_PART = re.compile(
    rf"(?P<fence>^(```+)(\w*)\n(?P<code>.*?)^\2$)|(?P<image>^{IMAGE.pattern}$)"
    rf"|(?P<piece>{PIECE.pattern})|(?P<exercise>{EXERCISE.pattern})"
    rf"|(?P<table>^{INCLUDE.pattern}$)",
    re.M | re.S,
)
_LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)\s#]+)")
_SETUP = {
    "en": "Run this notebook in a checkout after `make demo` or `pip install -e .`. "
    "In Colab, first run `!git clone …` and `%pip install -e .`.",
    "zh": "请在执行过 `make demo` 或 `pip install -e .` 的代码目录中运行本笔记本。"
    "在 Colab 中请先执行 `!git clone …` 和 `%pip install -e .`。",
}
_SOLUTION = {"en": "# @title Solution", "zh": "# @title 参考解答"}


def render(chapter: Chapter, lang: str) -> str:
    """Return the notebook of a chapter as JSON (nbformat 4.5)."""
    found = list(_merged(_parts(chapter, lang)))
    found.insert(1, ("markdown", _SETUP[lang]))
    content = {
        "cells": [
            _cell(number, kind, source)
            for number, (kind, source) in enumerate(found)
        ],
        "metadata": {
            "kernelspec": {
                "display_name": "Python 3",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def write(chapter: Chapter) -> None:
    """Write the notebook of a chapter in each language in which it has a page."""
    for lang in (lang for lang in LANGUAGES if chapter.page(lang).is_file()):
        path = chapter.notebook(lang)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(chapter, lang), encoding="utf-8", newline="\n")


def _cell(number: int, kind: str, source: str) -> dict[str, object]:
    lines = source.splitlines(keepends=True)
    if kind == "markdown":
        return {
            "cell_type": kind,
            "id": f"c{number}",
            "metadata": {},
            "source": lines,
        }
    hidden = {"jupyter": {"source_hidden": True}, "cellView": "form"}
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": f"c{number}",
        "metadata": hidden if kind == "solution" else {},
        "outputs": [],
        "source": lines,
    }


def _merged(parts: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Join neighbouring Markdown parts; the title stays alone."""
    texts: list[str] = []
    for kind, source in parts:
        is_text = kind == "markdown"
        if texts and (not is_text or source.startswith("## ")):
            yield "markdown", "\n\n".join(texts)
            texts = []
        if is_text:
            texts.append(source)
        else:
            yield kind, source
    if texts:
        yield "markdown", "\n\n".join(texts)


def _parts(chapter: Chapter, lang: str) -> Iterator[tuple[str, str]]:
    """Yield ("markdown" or "code" or "solution", source) in the order of the page."""
    title, _, text = chapter.text(lang).partition("\n\n")
    yield "markdown", title
    at = 0
    for part in _PART.finditer(text):
        yield from _prose(text[at : part.start()], chapter, lang)
        at = part.end()
        if part["code"] is not None:
            yield from _fence(part, chapter)
        elif part["image"]:
            target = IMAGE.fullmatch(part["image"])[2]  # type: ignore[index]
            yield "code", _figure(Path(target).name, chapter, lang)
        elif part["piece"]:
            yield from _prose(PIECE.fullmatch(part["piece"])[2], chapter, lang)  # type: ignore[index]
        elif part["exercise"]:
            yield from _solution(part["exercise"], chapter, lang)
        elif include := INCLUDE.fullmatch(part["table"]):
            yield "markdown", read_region(chapter.root / include[1], include[2])
    yield from _prose(text[at:], chapter, lang)


def _prose(text: str, chapter: Chapter, lang: str) -> Iterator[tuple[str, str]]:
    """Yield the sections of a text, with links that start at the notebook's folder."""
    origin, folder = chapter.page(lang).parent, chapter.notebook(lang).parent

    def moved(match: re.Match[str]) -> str:
        target = (origin / match[2]).resolve()
        return match[1] + os.path.relpath(target, folder).replace(os.sep, "/")

    text = _LINK.sub(moved, FACT.sub(r"\1", text)).strip()
    for section in re.split(r"\n(?=## )", text):
        if section.strip():
            yield "markdown", section.strip()


def _fence(part: re.Match[str], chapter: Chapter) -> Iterator[tuple[str, str]]:
    include = INCLUDE.search(part["code"])
    if include is None:
        yield "markdown", part["fence"]
        return
    file, region = include.groups()
    if file == chapter.path_in_repository("chapter.py"):
        yield "code", read_region(chapter.root / file, region)
    elif not file.startswith(chapter.path_in_repository("outputs/")):
        language = "js" if file.endswith(".js") else "python"
        yield (
            "markdown",
            f"```{language}\n{read_region(chapter.root / file, region)}\n```",
        )


def _figure(name: str, chapter: Chapter, lang: str) -> str:
    """Return code that draws a figure. Labels are English: few systems have Chinese fonts."""
    function = "figure_" + name.removesuffix(f".{lang}.svg").replace("-", "_")
    script = (chapter.folder / "chapter.py").read_text("utf-8")
    [source] = [
        ast.get_source_segment(script, node) or ""
        for node in ast.parse(script).body
        if isinstance(node, ast.FunctionDef) and node.name == function
    ]
    return (
        f"import matplotlib.pyplot as plt\n\n\n{source}\n\n\n"
        f'{function}(plt.figure(figsize=(6.4, 3.2), layout="constrained"), lambda en, zh: en)\n'
        "plt.show()"
    )


def _solution(block: str, chapter: Chapter, lang: str) -> Iterator[tuple[str, str]]:
    inner = EXERCISE.fullmatch(block)[1]  # type: ignore[index]
    inner = re.sub(r"<summary>.*?</summary>", "", inner)
    at = 0
    for part in re.finditer(r"^```python\n(.*?)^```$", inner, re.M | re.S):
        yield from _prose(inner[at : part.start()], chapter, lang)
        at = part.end()
        file, region = INCLUDE.search(part[1]).groups()  # type: ignore[union-attr]
        yield (
            "solution",
            f"{_SOLUTION[lang]}\n{read_region(chapter.root / file, region)}",
        )
    yield from _prose(inner[at:], chapter, lang)
