"""The interactive pieces of the book, in Chromium."""

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from docs.book.chapters import DOCS, PIECE, Chapter
from docs.book.staging import piece_html


class PiecePage:
    """A bare page with the interactive piece of one chapter, and what a reader can do with it."""

    def __init__(self, driver: Any, chapter: Chapter, lang: str, folder: Path) -> None:
        self.driver = driver
        self.lang = lang
        [match] = PIECE.finditer(chapter.text(lang))
        script = (chapter.folder / "piece.js").as_uri()
        style = (DOCS / "assets" / "book.css").as_uri()
        body = piece_html(chapter, lang, match).replace(f"{chapter.stem}.js", script)
        page = folder / f"{chapter.stem}.{lang}.html"
        page.write_text(
            f'<!doctype html><html lang="{lang}"><meta charset="utf-8"><title>x</title>'
            f'<meta name="viewport" content="width=device-width">'
            f'<link rel="stylesheet" href="{html.escape(style)}">'
            "<script>errors = []; onerror = (message) => errors.push(message)</script>"
            f"<body>{body}</body></html>",
            encoding="utf-8",
        )
        driver.get(page.as_uri())
        self.wait(lambda: self.find("[data-id]"))

    def wait(self, condition: Callable[[], Any]) -> None:
        """Wait until a condition holds, at most a minute."""
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, 60).until(lambda _: condition())

    def run(self, script: str, *arguments: object) -> Any:
        """Return the value of a JavaScript function body with arguments[0], …"""
        return self.driver.execute_script(script, *arguments)

    def find(self, css: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", f".piece {css}"))

    def part(self, name: str) -> Any:
        """Return the element with `data-id` NAME."""
        found = self.find(f'[data-id="{name}"]')
        assert len(found) == 1, (name, len(found), self.run("return errors"))
        return found[0]

    def text(self, name: str) -> str:
        found = self.texts(f'[data-id="{name}"]')
        assert len(found) == 1, (name, len(found), self.run("return errors"))
        return found[0]

    def texts(self, css: str) -> list[str]:
        """Return the texts of elements; those of hidden ones are empty."""
        script = (
            "return [...document.querySelectorAll(arguments[0])].map("
            "e => e.checkVisibility({visibilityProperty: true}) ? e.innerText.trim() : '')"
        )
        return [str(text) for text in self.run(script, f".piece {css}")]

    def write(self, name: str, value: str) -> None:
        """Set an input, a text area, a slider or a selection, as a reader would."""
        script = (
            "const found = document.querySelectorAll(arguments[0]);"
            "if (found.length === 1) {"
            "  found[0].value = arguments[1];"
            "  for (const kind of ['input', 'change'])"
            "    found[0].dispatchEvent(new Event(kind, {bubbles: true}))"
            "}"
            "return found.length"
        )
        found = self.run(script, f'.piece [data-id="{name}"]', value)
        assert found == 1, (name, found, self.run("return errors"))

    def click(self, css: str, number: int = 0) -> None:
        self.find(css)[number].click()

    def problems(self) -> Sequence[str]:
        """Return script errors, and what does not fit into a page of 360 pixels."""
        self.run("document.body.style.width = '344px'")
        wide = self.run("return document.querySelector('.piece').scrollWidth > 344")
        self.run("document.body.style.width = ''")
        return [*self.run("return errors"), *(["wider than a phone"] if wide else [])]
