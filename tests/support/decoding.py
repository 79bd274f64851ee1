"""Shorthands to run requests on an engine and collect what they generate."""

import time

import pytest

from minimind.environment import NATIVE_VARIABLE
from minimind.inference import native_library
from minimind.inference.engine import Engine
from minimind.inference.requests import Completion, Request
from minimind.inference.sampling import Sampling
from minimind.model import fused

GREEDY = Sampling(temperature=0)
RANDOM = Sampling(temperature=1, top_p=1)
CONTEXT = 256  # of the `nano` preset


def enable_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use compiled code from now on; skip the test without a compiler, fail if it fails."""
    monkeypatch.setenv(NATIVE_VARIABLE, "1")
    for reason in (fused.unavailable_reason(), native_library.unavailable_reason()):
        if reason is not None and ("no C++ compiler" in reason or "not supported on" in reason):
            pytest.skip(reason)
        assert reason is None


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
        num_free = len(engine._scheduler.free_slots)
        if (stats.running, stats.waiting, num_free) == (0, 0, slots):
            return True
        time.sleep(0.01)
    return False
