"""The model in the page reads the exported file, and its logits are those of the package."""

import json

from docs.book.chapters import Chapter
from tests.support.pieces import PiecePage

# Logits of a prompt, by the functions of the piece.
_LOGITS = """
    const model = document.querySelector(".piece").model, cache = [];
    model.useWasm = arguments[1];
    let logits;
    for (const id of arguments[0]) logits = forward(model, id, cache);
    return Array.from(logits);
"""
_PROMPT = 'return chatPrompt(tokenizerOf(document.querySelector(".piece").model), arguments[0])'


def answer(page: PiecePage, question: str) -> str:
    page.write("question", question)
    page.click('[data-id="ask"]')
    page.wait(lambda: not page.part("ask").get_attribute("disabled"))
    return page.text("answer")


def check(page: PiecePage) -> None:
    data = json.loads((Chapter("14-serving").outputs / "piece.json").read_text("utf-8"))
    asked = zip(data["questions"], data["prompts"], data["logits"], data["answers"], strict=False)
    for question, prompt, expected, reply in asked:
        assert page.run(_PROMPT, question) == prompt
        for use_wasm in (True, False):
            logits = page.run(_LOGITS, prompt, use_wasm)
            assert len(logits) == len(expected)
            assert max(abs(a - b) for a, b in zip(logits, expected, strict=True)) < 2e-3
        assert answer(page, question) == reply
    assert page.text("speed")

    page.click('[data-id="wasm"]')  # the same answer in plain JavaScript
    assert answer(page, data["questions"][0]) == data["answers"][0]
    page.click('[data-id="examples"] button', 1)
    assert page.part("question").get_attribute("value") == data["questions"][1]
    page.write("temperature", "2")
    answer(page, data["questions"][0])
    assert page.texts('[data-id="tokens"] .token')
