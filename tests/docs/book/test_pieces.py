"""The interactive piece of every chapter, in one headless Chromium.

`tests/docs/pieces/NN-name.py` of a chapter defines `check(page)`, which uses the piece in both
languages; `page.lang` tells them apart.
"""

import json
import runpy
from pathlib import Path

from docs.book.chapters import LANGUAGES, chapters
from tests.support.chromium import needs_chromium, start_chromium
from tests.support.pieces import PiecePage

CHECKS = Path(__file__).parents[1] / "pieces"


def test_every_piece_has_a_check() -> None:
    assert {path.stem for path in CHECKS.glob("*.py")} == {chapter.stem for chapter in chapters()}


@needs_chromium
def test_the_pieces_work_in_a_browser(tmp_path: Path) -> None:
    driver = start_chromium()
    try:
        for chapter in chapters():
            check = runpy.run_path(str(CHECKS / f"{chapter.stem}.py"))["check"]
            for lang in LANGUAGES:
                page = PiecePage(driver, chapter, lang, tmp_path)
                check(page)
                assert page.problems() == [], (chapter.stem, lang)
        log = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    finally:
        driver.quit()
    requests = [entry for entry in log if entry["method"] == "Network.requestWillBeSent"]
    urls = {entry["params"]["request"]["url"] for entry in requests}
    assert urls and all(url.startswith(("file:", "data:")) for url in urls)
