"""The router of the piece has the loads and the balance loss that the package computes."""

import json
import re

import torch

from docs.book.chapters import Chapter
from minimind.model.experts import Routing
from minimind.training.objectives.balance import balance_sums
from tests.support.pieces import PiecePage

DATA = json.loads((Chapter("09-experts").outputs / "piece.json").read_text("utf-8"))


def expected(run: str, number: int, bias: float = 0.0) -> tuple[list[int], float]:
    """Return the load of each expert and the balance loss of the package."""
    logits = torch.tensor(DATA["runs"][run])[None] + torch.tensor([bias, 0, 0, 0])
    routing = Routing([logits], [logits.topk(number).indices])
    mask = torch.ones(1, logits.shape[1], dtype=torch.bool)
    sums = balance_sums(routing, mask, None)
    loads: list[int] = sums["expert_tokens"][0].tolist()
    return loads, (sums["balance"][0] / sums["balance"][1]).item()


def loads(page: PiecePage) -> list[int]:
    script = "return [...document.querySelectorAll('.piece [data-load]')].map(e => e.dataset.load)"
    return [int(load) for load in page.run(script)]


def balance(page: PiecePage) -> float:
    return float(re.findall(r"[\d.]+", page.text("balance"))[0])


def dropped(page: PiecePage) -> int:
    return int(re.findall(r"\d+", page.text("summary"))[0])


def check(page: PiecePage) -> None:
    for run in ("0.01", "0"):
        page.write("run", run)
        for number in (1, 2, 4):
            page.write("number", str(number))
            rows, loss = expected(run, number)
            assert loads(page) == rows
            assert abs(balance(page) - loss) < 0.001
            assert dropped(page) == 0

    page.write("number", "2")
    page.write("bias", "3")
    rows, loss = expected("0", 2, bias=3)
    assert loads(page) == rows
    assert abs(balance(page) - loss) < 0.001
    page.write("capacity", "2")  # factor 1: 24 rows for each of four experts
    assert dropped(page) == sum(max(load - 24, 0) for load in rows) > 0
    assert len(page.find("[data-dropped]")) == dropped(page)
    page.click('[data-id="step"]')
    assert loads(page) == rows  # the router is so sure that the gradient is small
    for _ in range(5):
        page.click('[data-id="step"]')
    assert max(loads(page)) < 35
    page.click('[data-id="reset"]')
    assert loads(page) == expected("0", 2)[0]
    page.write("run", "0.01")
    for _ in range(4):
        page.click('[data-id="step"]')
    assert loads(page) == [24] * 4
    assert dropped(page) == 0
    assert abs(balance(page) - 1) < 0.002
    page.click(".token", 1)
    assert "×" in page.text("token")
