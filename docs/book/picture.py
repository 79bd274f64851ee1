"""Write docs/images/book.png, the picture of the book in the READMEs: a part of chapter 4.

    make book && python -m docs.book.picture

Needs Chromium and its driver.
"""

import sys
import time

from docs.book.chapters import DOCS, ROOT
from tests.support.chromium import start_chromium

_PAGE = ROOT / "site" / "en" / "book" / "04-transformer.html"
_SIZE = (1100, 900)
_SCROLL = """
const figure = document.querySelector('[aria-label^="Two heat maps"]');
window.scrollTo(0, figure.getBoundingClientRect().bottom + scrollY - innerHeight + 20);
"""


def main() -> None:
    """Take a screenshot of the built page."""
    if not _PAGE.is_file():
        sys.exit(f"{_PAGE.relative_to(ROOT)} is missing; run: make book")
    driver = start_chromium()
    try:
        driver.set_window_size(*_SIZE)
        driver.get(_PAGE.as_uri())
        driver.execute_script(_SCROLL)
        time.sleep(1)  # the title fades into the header
        driver.save_screenshot(str(DOCS / "images" / "book.png"))
    finally:
        driver.quit()


if __name__ == "__main__":
    main()
