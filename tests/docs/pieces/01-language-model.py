"""The next-byte explorer counts the same model as the chapter's script."""

import json
import math
from itertools import pairwise

from docs.book.chapters import Chapter
from tests.support.pieces import PiecePage

OUTPUTS = Chapter("01-language-model").outputs
SENTENCE = "Licensor grants You the right to use the Work."


def check(page: PiecePage) -> None:
    page.write("text", SENTENCE)
    unit = {"en": "bits per byte", "zh": "比特／字节"}[page.lang]
    [expected] = [
        line.split()[0]
        for line in (OUTPUTS / "units.txt").read_text("utf-8").splitlines()
        if "bits per byte" in line
    ]
    assert page.text("bits").endswith(f" = {expected} {unit}")
    assert len(page.find("span.token")) == len(SENTENCE)

    shares = [float(cell.split()[0]) for cell in page.texts("td:nth-child(2)")]
    assert len(shares) == 6 and all(a >= b for a, b in pairwise(shares))
    first = page.texts("td button")[0]
    page.click("td button")
    assert page.part("text").get_attribute("value") == SENTENCE + first.replace("␣", " ")
    page.click('[data-id="draw"]')
    assert len(page.part("text").get_attribute("value")) == len(SENTENCE) + 2

    page.write("order", "0")
    assert page.texts("td button")[0] == "␣"  # the most frequent byte
    page.write("text", "字 ~")  # only ASCII counts: the bytes of " ~"
    training = json.loads((OUTPUTS / "piece.json").read_text("utf-8"))["training"]
    counts = [(training.count(byte) + 1 / 256) / (len(training) + 1) for byte in " ~"]
    expected = f"{-sum(map(math.log2, counts)):.2f}"
    assert page.text("bits").startswith(f"{expected} "), page.text("bits")
    page.write("text", "")
    assert page.text("bits") == ""
