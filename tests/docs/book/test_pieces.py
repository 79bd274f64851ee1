"""The interactive piece of every chapter, in headless Chromium.

`tests/docs/pieces/NN-name.py` of a chapter defines `check(page)`, which uses the piece in both
languages; `page.lang` tells them apart.
"""

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from docs.book.chapters import LANGUAGES, Chapter, chapters
from tests.support.chromium import needs_chromium, start_chromium
from tests.support.pieces import PiecePage

CHECKS = Path(__file__).parents[1] / "pieces"


def test_every_piece_has_a_check() -> None:
    assert {path.stem for path in CHECKS.glob("*.py")} == {chapter.stem for chapter in chapters()}


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    driver = start_chromium()
    yield driver
    driver.quit()


@needs_chromium
@pytest.mark.parametrize("chapter", chapters(), ids=lambda chapter: chapter.stem)
def test_the_piece_works_in_a_browser(driver: Any, chapter: Chapter, tmp_path: Path) -> None:
    check = runpy.run_path(str(CHECKS / f"{chapter.stem}.py"))["check"]
    for lang in LANGUAGES:
        page = PiecePage(driver, chapter, lang, tmp_path)
        check(page)
        assert page.problems() == [], lang
    log = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    requests = [entry for entry in log if entry["method"] == "Network.requestWillBeSent"]
    urls = {entry["params"]["request"]["url"] for entry in requests}
    assert urls and all(url.startswith(("file:", "data:")) for url in urls)
