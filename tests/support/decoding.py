"""Shorthands to run requests on an engine and collect what they generate."""

import time

import pytest

from minimind.environment import NATIVE_VARIABLE
from minimind.inference.engine import Engine
from minimind.inference.native_library import unavailable_reason
from minimind.inference.requests import Completion, Request
from minimind.inference.sampling import Sampling

GREEDY = Sampling(temperature=0)
RANDOM = Sampling(temperature=1, top_p=1)
CONTEXT = 256  # of the `nano` preset


def enable_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode in compiled code from now on; skip the test where that is not possible."""
    monkeypatch.setenv(NATIVE_VARIABLE, "1")
    if reason := unavailable_reason():
        pytest.skip(reason)


def tokens_of(completion: Completion) -> list[int]:
    """Wait for a completion and return its tokens."""
    return [token for piece in completion for token in piece.token_ids]


def text_of(completion: Completion) -> str:
    """Wait for a completion and return its text."""
    return "".join(piece.text for piece in completion)


def generate(engine: Engine, *requests: Request) -> list[list[int]]:
    """Run requests together and return the tokens of each."""
    outputs = dict(engine.generate(requests))
    return [list(outputs[index].token_ids) for index in range(len(requests))]


def becomes_idle(engine: Engine, slots: int = 9) -> bool:
    """Return True when all slots are free within the second that a request may take to leave."""
    end = time.monotonic() + 1
    while time.monotonic() < end:
        stats = engine.stats()
        if (stats.running, stats.waiting, stats.free_slots) == (0, 0, slots):
            return True
        time.sleep(0.01)
    return False
