"""The playground makes the merges of the chapter's table."""

import re

from docs.book.chapters import Chapter
from tests.support.pieces import PiecePage


def check(page: PiecePage) -> None:
    table = (Chapter("02-tokenizer").outputs / "merges.en.md").read_text("utf-8").splitlines()[2:]
    rows = [re.findall(r"`([^`]+)`", row) for row in table]
    counts = [row.split(" | ")[2] for row in table]
    for (first, second), count in zip(rows[:4], counts, strict=False):
        assert page.text("next").endswith(f"{first} + {second} ({count})")
        page.click('[data-id="step"]')
    page.click('[data-id="ten"]')
    assert page.text("count") == str(len(rows)) == "14"
    assert page.texts('[data-id="merges"] .token')[-1] == "长"

    page.write("text", "riverbed 长城")
    tokens = ["river", "b", "e", "d", "␣", "长", "E5", "9F", "8E"]
    assert page.texts('[data-id="encoded"] .token') == tokens
    assert page.text("ratio").endswith("= 1.67")  # 15 bytes in 9 tokens

    page.click('[data-id="reset"]')
    assert page.text("count") == "0" and len(page.find('[data-id="encoded"] .token')) == 15
    page.write("words", "aa aaa")
    page.click('[data-id="ten"]')
    assert page.text("count") == "2" and page.part("step").get_attribute("disabled")
