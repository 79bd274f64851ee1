"""Simulated judges for RemoteService."""

import json
from collections.abc import Sequence


def shown_answers(messages: Sequence[dict[str, str]]) -> list[str]:
    """Extract the answers from a request to a judge."""
    parts = messages[-1]["content"].split("[answer ")[1:]
    return [part.split("]\n", 1)[1].split("\n[end of answer")[0] for part in parts]


def longer_is_better(messages: Sequence[dict[str, str]]) -> str:
    scores = [min(len(answer), 100) for answer in shown_answers(messages)]
    reason = "The longer, the better."
    return json.dumps({"reason": reason} | dict(zip("AB", scores, strict=False)))
