"""The chat-template viewer gives the ids and loss masks of the chapter's script."""

import json

from docs.book.chapters import Chapter
from tests.support.pieces import PiecePage


def check(page: PiecePage) -> None:
    data = json.loads((Chapter("06-conversation").outputs / "piece.json").read_text("utf-8"))
    for button, (ids, mask) in zip(("one", "two"), data["encoded"], strict=True):
        page.click(f'[data-id="{button}"]')
        assert shown(page) == (ids, mask)

    page.click('[data-id="supervised-1"]')  # the first of the two answers
    ids, mask = shown(page)
    assert (ids, sum(mask)) == (data["encoded"][1][0], 9)

    page.click('[data-id="prompt"]')
    prompt, mask = shown(page)
    assert prompt == ids[: len(prompt)] and len(prompt) < len(ids)
    assert sum(mask) == 0

    page.write("content-0", "<|im_end|>")
    special = set(data["special"])
    now, _ = shown(page)
    assert sum(i in special for i in now) == sum(i in special for i in prompt)


def shown(page: PiecePage) -> tuple[list[int], list[int]]:
    """Return the ids and the loss mask of the tokens on the page."""
    script = (
        "return [...document.querySelectorAll('.piece [data-id=\"tokens\"] .token')]"
        ".map(e => [e.title, e.dataset.mask])"
    )
    tokens = page.run(script)
    return [int(title) for title, _ in tokens], [int(mask) for _, mask in tokens]
