"""The packing playground packs as the chapter's script does."""

import re

from docs.book.chapters import Chapter
from tests.support.pieces import PiecePage


def check(page: PiecePage) -> None:
    text = (Chapter("03-data").outputs / "pack.txt").read_text("utf-8")
    results = re.findall(r"^(\w+ \w+): (\d+) sequences, (\d+)%$", text, re.M)
    assert len(results) == 3
    for strategy, count, share in results:
        page.write("strategy", strategy)
        assert page.text("result") == f"80 / ({count} × 16) = {share} %"
        assert len(page.find('[data-id="rows"] > div')) == int(count)

    page.click('[data-id="sort"]')
    assert page.text("result") == "80 / (5 × 16) = 100 %"  # the solution of exercise 3.4
    page.click('[data-id="shuffle"]')
    assert page.text("result").startswith("80 / (")

    page.write("length", "10")
    page.write("sizes", "12, 4 x 3")
    assert page.text("result") == "17 / (2 × 10) = 85 %"  # 12 is truncated to 10
    assert page.text("truncated").startswith("1 ")
    page.write("sizes", "")
    assert "=" not in page.text("result") and not page.find('[data-id="rows"] > div')
    page.click('[data-id="reset"]')
    assert page.text("result") == "80 / (7 × 16) = 71 %"
