"""The picture is approximated as in the chapter, and adapters have the sizes of the package's."""

import re

from docs.book.chapters import Chapter
from tests.support.pieces import PiecePage

OUTPUTS = Chapter("07-lora").outputs


def check(page: PiecePage) -> None:
    lines = (OUTPUTS / "low-rank.txt").read_text("utf-8").splitlines()
    for line in lines:
        rank, numbers, error = re.findall(r"[\d.]+", line)
        page.write("rank", rank)
        assert page.text("error").startswith(f"{numbers} ")
        assert page.text("error").endswith(f" {error} %"), page.text("error")

    [size] = re.findall(r"([\d,]+ of [\d,]+)", (OUTPUTS / "small.txt").read_text("utf-8"))
    assert size.replace(" of ", " / ") in page.text("trained")  # rank 8 of `small`
    page.write("rank", "16")
    page.write("model", "demo")
    assert "299,008 / " in page.text("trained")  # benchmarks/records/lora.md

    page.write("picture", "checkerboard")
    page.write("rank", "1")
    assert page.text("error").endswith(" 70.7 %")  # two singular values of the same size
    page.write("rank", "2")
    assert page.text("error").endswith(" 0.0 %")
    page.write("picture", "diagonal")
    page.write("rank", "16")
    assert page.text("error").endswith(" 70.7 %")  # half of 32 equal singular values are missing
    page.write("picture", "black")
    assert page.text("error").endswith(" 0.0 %")
    page.write("rank", "1")
    script = (
        "const [canvas] = arguments, box = canvas.getBoundingClientRect();"
        "for (const dot of [0.5, 1.5]) canvas.dispatchEvent(new PointerEvent('pointerdown', {"
        "  clientX: box.left + dot * box.width / 32, clientY: box.top + dot * box.height / 32}))"
    )
    page.run(script, page.part("original"))
    assert page.text("error").endswith(" 70.7 %")  # two dots in different rows and columns
