"""The ring moves the numbers that the chapter's script moves, and the times are the script's."""

import re

from docs.book.chapters import Chapter
from tests.support.pieces import PiecePage

OUTPUTS = Chapter("13-many-processes").outputs


def grid(page: PiecePage) -> list[str]:
    return page.texts('[data-id="grid"] td')


def check(page: PiecePage) -> None:
    lines = (OUTPUTS / "trace.txt").read_text("utf-8").splitlines()
    expected = [re.findall(r"\d+", line) for line in lines if "|" in line]
    assert len(expected) == 5
    assert grid(page) == expected[0]
    for numbers in expected[1:]:
        page.click('[data-id="next"]')
        assert grid(page) == numbers
    assert page.part("next").get_attribute("disabled")
    assert "1.33" in page.text("sent")  # 2 (3 - 1) / 3 gradients

    speeds = (OUTPUTS / "speedup.txt").read_text("utf-8")
    for link in ("NVLink", "10 Gbit Ethernet"):
        [two] = re.findall(rf"{link} .*'2: ([\d.]+)'", speeds)
        page.write("size", "2")
        page.write("link", link)
        assert f"{two} " in page.text("speedup")
    times = dict(
        re.findall(r"^(.+?) +([\d.]+) ms$", (OUTPUTS / "cost.txt").read_text("utf-8"), re.M)
    )
    assert set(times) == {"NVLink", "PCIe 4.0 x16", "10 Gbit Ethernet", "1 Gbit Ethernet"}

    page.write("size", "5")
    page.click('[data-id="end"]')
    assert grid(page) == ["11111"] * 25
    page.click('[data-id="reset"]')
    assert grid(page)[:5] == ["1"] * 5
