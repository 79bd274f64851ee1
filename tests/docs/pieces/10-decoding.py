"""The model of the piece writes what the chapter's int8 model writes, and the knobs agree too."""

import json
import re

from docs.book.chapters import Chapter
from tests.support.pieces import PiecePage

DATA = json.loads((Chapter("10-decoding").outputs / "piece.json").read_text("utf-8"))
NEUTRAL = {"temperature": "1", "top-k": "0", "top-p": "1", "min-p": "0", "penalty": "1"}


def probabilities(page: PiecePage) -> list[float]:
    return [float(text) for text in page.texts("td:nth-child(2)")]


def check(page: PiecePage) -> None:
    for case in DATA["expected"]:
        page.write("prompt", case["prompt"])
        for name, value in (NEUTRAL | case["settings"]).items():
            page.write(name, value)
        count = int(re.findall(r"\d+", page.text("summary"))[0])
        assert count == case["count"], case
        shown = probabilities(page)[: len(case["top"])]
        assert all(abs(a - b) < 0.001 for a, b in zip(shown, case["top"], strict=True)), case

    page.write("prompt", "The")
    for name, value in (NEUTRAL | {"temperature": "0"}).items():
        page.write(name, value)
    assert page.part("top-p").get_attribute("disabled")
    page.click('[data-id="many"]')
    assert page.text("text") == DATA["greedy"]
    page.click('[data-id="again"]')
    assert page.text("text") == "<s> The"
    for _ in range(20):
        page.click('[data-id="one"]')
    assert page.text("text") == DATA["greedy"]

    page.write("temperature", "1")
    page.click('[data-id="again"]')
    texts = set()
    for _ in range(2):  # other random numbers, another text
        page.click('[data-id="many"]')
        texts.add(page.text("text"))
        page.click('[data-id="again"]')
    assert len(texts) == 2
