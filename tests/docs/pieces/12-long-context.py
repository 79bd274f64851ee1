"""The piece has the frequencies of the package and the scores of the chapter's head."""

import json
import math
import re

import torch

from docs.book.chapters import Chapter
from minimind.config.model import ModelConfig
from minimind.model.rope import extend_context, rope_frequencies
from tests.support.pieces import PiecePage

LENGTHS = [512, 768, 1024, 2048, 4096, 8192, 16384]
CONFIG = ModelConfig(head_dim=64, max_position_embeddings=512)


def numbers(text: str) -> list[float]:
    return [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", text.replace("−", "-"))]


def expected(
    kind: str, length: int, weights: torch.Tensor
) -> tuple[int, list[float], float, torch.Tensor]:
    """Return the pairs with unseen angles, the scores, and the attention of both heads.

    Attention: the percentage within 512 tokens, and by distance for the head that looks back.
    """
    trained, _ = rope_frequencies(CONFIG, 1)
    changed, factor = trained, 1.0
    if kind != "none" and length > 512:
        changed, factor = rope_frequencies(extend_context(CONFIG, length, kind), length)
    turn = 2 * math.pi
    known, reached = (trained * 512).clamp(max=turn), (changed * length).clamp(max=turn)
    angles = torch.arange(length)[:, None] * changed.double()
    scores = torch.cat((angles.cos(), angles.sin()), 1) @ weights
    share = (scores * factor**2).softmax(0)[:512].sum().item()
    back = (2 * factor**2 * (angles - trained.double()).cos().sum(1)).softmax(0)
    return int((reached > known * (1 + 1e-5)).sum()), scores.tolist(), 100 * share, back


def pairs_unseen(page: PiecePage) -> float:
    return numbers(page.text("unseen"))[{"en": 0, "zh": 1}[page.lang]]


def check(page: PiecePage) -> None:
    data = json.loads((Chapter("12-long-context").outputs / "piece.json").read_text("utf-8"))
    weights = torch.tensor(data["weights"], dtype=torch.float64)
    assert len(page.find('[data-id="dials"] text')) == 8
    for kind in ("none", "linear", "dynamic", "yarn"):
        page.write("kind", kind)
        for length in (512, 768, 2048, 16384):
            page.write("length", str(LENGTHS.index(length)))
            unseen, scores, share, back = expected(kind, length, weights)
            assert pairs_unseen(page) == unseen, (kind, length)
            _, first, _, at_511, last = numbers(page.text("scores"))
            for value, shown in ((scores[0], first), (scores[511], at_511), (scores[-1], last)):
                assert abs(value - shown) < 0.02, (kind, length)
            _, distance, previous = numbers(page.text("back"))
            assert abs(previous - 100 * back[1].item()) < 0.2
            assert back[int(distance)] > 0.99 * back.max()
            assert abs(numbers(page.text("share"))[-1] - share) < 0.1
    page.write("length", "3")
    page.write("kind", "none")
    assert pairs_unseen(page) == 16
    assert page.find('[data-id="dials"] [stroke="#e8833a"]')
    page.write("kind", "yarn")
    assert pairs_unseen(page) == 0
    assert not page.find('[data-id="dials"] [stroke="#e8833a"]')
