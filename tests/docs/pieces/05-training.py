"""The schedule explorer trains the same table as the chapter's script."""

from docs.book.chapters import Chapter
from tests.support.pieces import PiecePage


def check(page: PiecePage) -> None:
    output = (Chapter("05-training").outputs / "schedules.txt").read_text("utf-8")
    distance = {line.split()[0]: line.split()[1] for line in output.splitlines()}
    assert distance["cosine"] in page.text("result")
    assert page.part("decay").get_attribute("disabled")
    page.write("name", "wsd")
    assert distance["wsd"] in page.text("result")
    page.write("name", "constant")
    page.write("warmup", "0")
    assert distance["constant"] in page.text("result")
    assert page.text("warmup-value") == "0 %"

    page.write("peak", "6")  # diverges; the curve stays within the picture
    assert page.text("peak-value") == "300"
    points = str(page.part("loss").get_attribute("points")).split()
    assert len(points) == 401
    assert all(0 <= float(point.split(",")[1]) <= 120 for point in points)
