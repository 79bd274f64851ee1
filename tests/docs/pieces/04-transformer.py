"""The heat map has the weights that the chapter's script computes."""

import json

from docs.book.chapters import Chapter
from tests.support.pieces import PiecePage


def weights(page: PiecePage) -> list[float]:
    script = (
        "return [...document.querySelectorAll('.piece [data-weight]')].map(e => e.dataset.weight)"
    )
    return [float(weight) for weight in page.run(script)]


def check(page: PiecePage) -> None:
    data = json.loads((Chapter("04-transformer").outputs / "piece.json").read_text("utf-8"))
    expected = [weight for t, row in enumerate(data["previous"]) for weight in row[: t + 1]]
    assert len(weights(page)) == len(expected) == 45
    assert all(abs(a - b) < 0.002 for a, b in zip(weights(page), expected, strict=True))
    assert page.texts('[data-id="weights"] .token') == ["river 1.00"]

    page.click('[data-id="rotates"]')  # without rotation all positions look the same
    assert weights(page)[-1] == 0.111
    page.click('[data-id="rotates"]')
    page.write("offset", "3")
    assert page.texts('[data-id="weights"] .token') == ["and 1.00"]

    page.write("head", "same")
    assert page.texts('[data-id="weights"] .token') == ["is 0.50", "is 0.50"]
    assert page.part("offset").get_attribute("disabled")
    page.write("head", "following")
    assert page.texts('[data-id="weights"] .token') == ["long 1.00"]
    page.write("words", "a b a")
    assert page.texts('[data-id="weights"] .token') == ["b 1.00"]
    page.write("factor", "0")
    assert weights(page)[-4:] == [0.25] * 4
    page.write("words", "")
    assert page.texts('[data-id="weights"] .token') == ["<s> 1.00"]
