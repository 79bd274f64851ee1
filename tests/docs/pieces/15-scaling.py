"""The calculator computes the law of the chapter, with the effective tokens of the package."""

import json

from benchmarks.scaling_law import effective_tokens
from docs.book.chapters import Chapter
from tests.support.pieces import PiecePage

DATA = json.loads((Chapter("15-scaling").outputs / "piece.json").read_text("utf-8"))
HOURS = [0.25, 0.5, 1, 2, 4, 8, 24, 100, 1000]
UNIQUE = [1e6, 3e6, 1e7, 6.8e7, 3e8, 1e9, 1e10, float("inf")]


def loss(parameters: float, flops: float, unique: float) -> float:
    """The law at the tokens that the budget allows."""
    law, tokens = DATA["law"], flops / 6 / parameters
    if tokens > unique:
        tokens = effective_tokens(tokens, unique)
    size, data = law["A"] / parameters ** law["alpha"], law["B"] / tokens ** law["beta"]
    return float(law["E"] + size + data)


def check(page: PiecePage) -> None:
    warnings = {
        "en": ("within the range of the runs", "beyond the largest run", "smaller than"),
        "zh": ("在拟合的范围之内", "只能算猜测", "比拟合所用的模型都小"),
    }[page.lang]
    # Two laptop cores, 20 %, 15 minutes: 1.8e14 FLOPs; a model of a million parameters.
    page.write("hours", "0")
    page.write("size", "20")
    page.write("unique", "7")
    results = page.texts("td:nth-child(2)")
    assert results[:5] == ["1.8e14 FLOPs", "30M", "30", "1", "30M"]
    assert results[5] == f"{loss(1e6, 1.8e14, float('inf')):.3f}"
    assert warnings[1] in page.text("warning")

    page.write("unique", "0")  # the same tokens, of a text of a million
    results = page.texts("td:nth-child(2)")
    worth = effective_tokens(30e6, 1e6)
    assert results[3:5] == ["30.00", f"{worth / 1e6:.3g}M"]
    assert results[5] == f"{loss(1e6, 1.8e14, 1e6):.3f}"
    sizes = [10 ** (5 + i / 20) for i in range(81)]
    assert results[6].endswith(f" {min(loss(size, 1.8e14, 1e6) for size in sizes):.3f}")

    page.write("use", "1")  # 9e12 FLOPs: 1.5 million tokens
    assert page.text("warning") == warnings[0]
    page.write("size", "0")
    assert warnings[1] in page.text("warning") and " 3.75 " in f" {page.text('warning')}"
    page.write("machine", "2")
    page.write("hours", "2")  # an hour of an H100 at 1 %
    assert page.texts("td:nth-child(2)")[0] == "3.6e16 FLOPs"
