"""Admission, prefill budget and prefix cache, tested through the engine."""

import random
import time

import pytest

from minimind.inference.engine import Engine
from minimind.inference.requests import Request
from minimind.model import Transformer
from minimind.tokenizer import Tokenizer
from tests.support.decoding import GREEDY, tokens_of


def test_first_come_first_served(model: Transformer, tokenizer: Tokenizer) -> None:
    delivered: list[int] = []
    with Engine(model, tokenizer, slots=2) as engine:
        completions = [
            engine.submit(Request([i + 1], GREEDY, 3), lambda p, n=i: delivered.append(n))
            for i in range(12)
        ]
        while delivered.count(11) < 3:
            time.sleep(0.01)
        assert [c.completion_tokens for c in completions] == [3] * 12
    first = sorted(range(12), key=delivered.index)
    assert all(abs(rank - number) <= 1 for rank, number in enumerate(first))  # two at a time


def test_decoding_continues_while_long_prompts_are_prefilled(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    decoded: list[int] = []  # tokens of `running` when each other sequence gets its first
    with Engine(model, tokenizer, slots=8) as engine:
        running = engine.submit(Request([5], GREEDY, 250))
        next(iter(running))
        for number in range(7):  # 28 chunks; a step prefills 4 of them
            prompt = random.Random(number).choices(range(600), k=250)
            request = Request(prompt, GREEDY, 1)
            engine.submit(request, lambda p: decoded.append(running.completion_tokens))
        while len(decoded) < 7:
            time.sleep(0.001)
        running.cancel()
    assert decoded == sorted(set(decoded))
    assert decoded[-1] < 250


@pytest.mark.numeric
def test_cached_prefixes_are_not_prefilled_again(
    engine: Engine, sequential_engine: Engine, tokenizer: Tokenizer
) -> None:
    shared = random.Random(9).choices(range(600), k=150)
    firsts = [shared + [n] * 5 for n in range(4)]
    expected = []
    for prompt in firsts:
        tokens_of(sequential_engine.submit(Request([7] * 200, GREEDY, 1)))  # evicts the prefix
        uncached = sequential_engine.submit(Request(prompt, GREEDY, 30, logprobs=0))
        expected.append([(p.token_ids, p.logprobs) for p in uncached])
        assert uncached.cached_tokens == 0
    tokens_of(engine.submit(Request(shared, GREEDY, 1)))
    reused = [engine.submit(Request(prompt, GREEDY, 30, logprobs=0)) for prompt in firsts]
    actual = [[(p.token_ids, p.logprobs) for p in completion] for completion in reused]
    assert actual == expected  # log-probabilities too: the same bits
    assert [completion.cached_tokens for completion in reused] == [128] * 4
    # A conversation's next prompt starts with its previous prompt and answer.
    longer = firsts[0] + [token for ids, _ in expected[0] for token in ids] + [3, 4, 5]
    again = engine.submit(Request(longer, GREEDY, 1))
    tokens_of(again)
    assert again.cached_tokens == 128
    # Of a prompt that is cached to its end, the last chunk is prefilled again.
    cached = engine.submit(Request(shared[:128], GREEDY, 1))
    tokens_of(cached)
    assert cached.cached_tokens == 64


def test_requests_wait_for_a_prefix_in_prefill(engine: Engine, sequential_engine: Engine) -> None:
    shared = random.Random(10).choices(range(600), k=200)
    requests = [Request(shared + [n] * 5, GREEDY, 9) for n in range(5)]
    other = Request([n % 600 for n in range(200)], GREEDY, 9)  # shares nothing
    expected = [tokens_of(sequential_engine.submit(request)) for request in (*requests, other)]
    completions = [engine.submit(request) for request in (*requests, other)]
    assert [tokens_of(completion) for completion in completions] == expected
    assert [c.cached_tokens for c in completions] == [0, 192, 192, 192, 192, 0]


def test_the_awaited_prefix_may_be_cancelled(model: Transformer, tokenizer: Tokenizer) -> None:
    """Cancelled during prefill: the next request continues from there."""
    shared = random.Random(11).choices(range(600), k=250)
    with Engine(model, tokenizer, slots=2) as engine:
        decoding = engine.submit(Request([5], GREEDY, 250))  # limits the chunks per step
        next(iter(decoding))
        first = engine.submit(Request([*shared, 1], GREEDY, 3))
        second = engine.submit(Request([*shared, 2], GREEDY, 3))
        first.cancel()
        assert len(tokens_of(second)) == 3
        decoding.cancel()
    assert first.completion_tokens <= 3
