"""The engine: batches do not change results, and finished requests leave nothing behind."""

import gc
import random
import threading
import time
import weakref
from collections import defaultdict

import pytest
import torch

from minimind.errors import ModelError, UsageError
from minimind.inference.engine import Engine
from minimind.inference.requests import Completion, Piece, Request
from minimind.inference.sampling import Sampling
from minimind.model import Transformer
from minimind.tokenizer import Tokenizer
from tests.support.decoding import CONTEXT, GREEDY, RANDOM, becomes_idle, generate, tokens_of
from tests.support.devices import NoDoubles


@pytest.mark.numeric
def test_greedy_tokens_equal_the_argmax_of_the_full_sequence(
    engine: Engine, model: Transformer, prompts: list[list[int]]
) -> None:
    for prompt in prompts[:4]:
        ids = list(prompt)
        for token in tokens_of(engine.submit(Request(prompt, GREEDY, 40))):
            with torch.inference_mode():
                assert model.logits(model(torch.tensor([ids]))[0, -1]).argmax().item() == token
            ids.append(token)
        assert len(ids) == len(prompt) + 40
        assert len(set(ids)) > 10


@pytest.fixture(scope="module")
def greedy_tokens(sequential_engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """The greedy tokens of each prompt without other requests, 30 each."""
    return generate(sequential_engine, *(Request(prompt, GREEDY, 30) for prompt in prompts))


@pytest.mark.numeric
def test_greedy_tokens_are_the_same_alone_and_in_a_batch(
    engine: Engine, prompts: list[list[int]], greedy_tokens: list[list[int]]
) -> None:
    """100 prompts, each alone and in batches of 9."""
    requests = [Request(prompt, GREEDY, 30) for prompt in prompts]
    assert generate(engine, *requests) == greedy_tokens
    assert len({tuple(tokens) for tokens in greedy_tokens}) > 80
    assert becomes_idle(engine)


def test_cancelled_requests_leave_nothing_behind(
    engine: Engine, prompts: list[list[int]], greedy_tokens: list[list[int]]
) -> None:
    """Half of the requests are cancelled at a random token."""
    rng = random.Random(3)
    pieces: dict[int, list[Piece]] = defaultdict(list)
    completions: dict[int, Completion] = {}
    limits = {i: rng.randrange(0, 25) for i in range(1, 100, 2)}

    def deliver(number: int, piece: Piece) -> None:
        pieces[number].append(piece)
        completion = completions.get(number)
        if number % 2 and completion is not None and completion.completion_tokens >= limits[number]:
            completion.cancel()

    for number in range(100):
        request = Request(prompts[number], GREEDY, 30)
        completions[number] = engine.submit(request, lambda p, n=number: deliver(n, p))
        if number % 2 and limits[number] == 0:
            completions[number].cancel()
        if rng.random() < 0.2:
            time.sleep(rng.random() * 0.02)
    end = time.monotonic() + 60
    while not all(pieces[n] and pieces[n][-1].finish_reason for n in range(100)):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert becomes_idle(engine)
    for number, delivered in pieces.items():
        assert [p.finish_reason for p in delivered[:-1]] == [None] * (len(delivered) - 1)
        tokens = [token for piece in delivered for token in piece.token_ids]
        if number % 2 == 0:
            assert delivered[-1].finish_reason == "length"
            assert tokens == greedy_tokens[number]
        else:
            # Tokens without text are not delivered, so a few requests finish uncancelled.
            assert delivered[-1].finish_reason in ("cancelled", "length")
    assert sum(delivered[-1].finish_reason == "cancelled" for delivered in pieces.values()) > 40
    memory = engine.model.cache.data.data_ptr()
    assert tokens_of(engine.submit(Request(prompts[0], GREEDY, 30))) == greedy_tokens[0]
    assert engine.model.cache.data.data_ptr() == memory


@pytest.mark.numeric
def test_a_seed_gives_the_same_tokens_in_any_batch(
    engine: Engine, sequential_engine: Engine, prompts: list[list[int]]
) -> None:
    all_settings = Sampling(
        temperature=1.2, top_p=0.9, top_k=200, min_p=0.001, repetition_penalty=1.1
    )
    kinds = [RANDOM, all_settings, Sampling(0.7, 0.9), GREEDY]
    requests = [Request(prompts[0], kinds[i % 4], 20, seed=i // 4) for i in range(24)]
    expected = generate(sequential_engine, *requests)
    assert generate(engine, *requests) == expected
    assert generate(engine, *requests[::-1]) == expected[::-1]
    assert len({tuple(tokens) for tokens in expected[::4]}) == 6
    unseeded = Request(prompts[0], RANDOM, 20)
    assert tokens_of(engine.submit(unseeded)) != tokens_of(engine.submit(unseeded))


def test_stop_tokens_end_a_completion_and_are_not_returned(
    engine: Engine, prompts: list[list[int]]
) -> None:
    ids = tokens_of(engine.submit(Request(prompts[0], GREEDY, 60)))
    stop = ids[20]
    completion = engine.submit(Request(prompts[0], GREEDY, 60, stop_ids=frozenset({stop})))
    pieces = list(completion)
    assert [t for p in pieces for t in p.token_ids] == ids[: ids.index(stop)]
    assert pieces[-1].finish_reason == "stop"
    assert completion.completion_tokens == ids.index(stop)
    assert completion.prompt_tokens == len(prompts[0])


def test_length_is_limited_by_the_request_and_the_context(
    engine: Engine, prompts: list[list[int]]
) -> None:
    long = (prompts[0] * CONTEXT)[: CONTEXT - 3]
    for request, length in [
        (Request(prompts[0], GREEDY, 1), 1),
        (Request(long, GREEDY), 3),
        (Request(long, GREEDY, 9), 3),
        (Request((long * 2)[: CONTEXT - 1], GREEDY), 1),
    ]:
        pieces = list(engine.submit(request))
        assert sum(len(piece.token_ids) for piece in pieces) == length
        assert pieces[-1].finish_reason == "length"


def test_invalid_requests_are_refused(engine: Engine) -> None:
    for request, message in [
        (Request([], GREEDY), "the prompt is empty"),
        (
            Request([5] * CONTEXT, GREEDY),
            f"the prompt has {CONTEXT} tokens and the model's context is {CONTEXT}",
        ),
        (Request([600], GREEDY), "prompt: token ids go from 0 to 599 in this model"),
        (Request([-1], GREEDY), "prompt: token ids go from 0 to 599"),
        (Request([5], Sampling(logit_bias={600: 1})), "logit_bias: token ids go from 0 to 599"),
        (Request([5], GREEDY, -1), "max_new_tokens is -1; it must be 0 or more"),
    ]:
        with pytest.raises(UsageError, match=message):
            engine.submit(request)
    with pytest.raises(UsageError, match="the prompt is empty"):  # before the first text
        engine.stream_text([], max_new_tokens=9, sampling=GREEDY)


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_fail_one_request(
    model: Transformer, tokenizer: Tokenizer, damage: float
) -> None:
    """A damaged embedding row fails the request that uses it, not later ones in its slot."""
    bad, good = 17, [[3], [4, 5], [6] * 70]
    weight = model.model.embed_tokens.weight
    original = weight.detach().clone()
    with Engine(model, tokenizer, slots=4) as reference:
        expected = [tokens_of(reference.submit(Request(p, GREEDY, 30))) for p in good]
    head = model.lm_head
    try:
        with torch.no_grad():  # the head keeps the sound weights
            model.lm_head = torch.nn.Linear(*weight.shape[::-1], bias=False)
            model.lm_head.weight.copy_(original)
            weight[bad] = damage
        with Engine(model, tokenizer, slots=4) as engine:
            healthy = [engine.submit(Request(p, GREEDY, 30)) for p in good]
            failing = engine.submit(Request([bad] * 100, RANDOM, 30))
            with pytest.raises(ModelError, match="logits are not finite"):
                list(failing)
            assert [tokens_of(completion) for completion in healthy] == expected
            for _ in range(2):  # so that every slot is reused
                after = [engine.submit(Request(p, GREEDY, 30)) for p in good]
                assert [tokens_of(completion) for completion in after] == expected
    finally:
        model.lm_head = head
        with torch.no_grad():
            weight.copy_(original)


def test_a_receiver_that_raises_fails_only_its_own_request(
    engine: Engine, prompts: list[list[int]], greedy_tokens: list[list[int]]
) -> None:
    def broken(piece: Piece) -> None:
        raise RuntimeError("gone")

    healthy = engine.submit(Request(prompts[0], GREEDY, 30))
    failing = engine.submit(Request(prompts[1], GREEDY, 200), broken)
    assert tokens_of(healthy) == greedy_tokens[0]
    assert becomes_idle(engine)
    assert isinstance(failing.error, RuntimeError)
    assert failing.completion_tokens < 200


def test_requests_may_be_submitted_from_many_threads(
    engine: Engine, prompts: list[list[int]], greedy_tokens: list[list[int]]
) -> None:
    actual: dict[int, list[int]] = {}

    def submit(number: int) -> None:
        actual[number] = tokens_of(engine.submit(Request(prompts[number], GREEDY, 10)))

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [actual[number] for number in range(16)] == [
        tokens[:10] for tokens in greedy_tokens[:16]
    ]


def test_closing_cancels_running_and_waiting_requests(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    engine = Engine(model, tokenizer, slots=1)
    completions = [engine.submit(Request([5], GREEDY)) for _ in range(3)]
    next(iter(completions[0]))
    engine.close()
    for completion in completions:
        assert list(completion)[-1].finish_reason == "cancelled"
    engine.close()
    with pytest.raises(UsageError, match="the model is closed; load it again"):
        engine.submit(Request([5], GREEDY))


def test_a_stream_of_text_that_is_closed_at_once_is_cancelled(engine: Engine) -> None:
    engine.stream_text([5], max_new_tokens=10_000, sampling=GREEDY).close()
    assert becomes_idle(engine)


def test_a_closed_engine_is_freed_while_another_is_idle(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    with Engine(model, tokenizer) as first:
        second = Engine(model, tokenizer)
        tokens_of(second.submit(Request([5], GREEDY, 2)))
        second.close()
        freed = weakref.ref(second)
        del second
        for _ in range(200):  # the thread finishes its round after `close` has returned
            gc.collect()
            if freed() is None:
                break
            time.sleep(0.05)
        assert freed() is None
        assert tokens_of(first.submit(Request([5], GREEDY, 2)))


def test_engines_share_one_thread(model: Transformer, tokenizer: Tokenizer) -> None:
    def engine_threads() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name == "minimind-engine"]

    before = engine_threads()  # of fixtures of other tests
    with Engine(model, tokenizer) as first, Engine(model, tokenizer) as second:
        completions = [
            e.submit(Request([5], GREEDY, 20)) for e in (first, second) for _ in range(3)
        ]
        assert len({tuple(tokens_of(completion)) for completion in completions}) == 1
        assert len(engine_threads()) == 1
    for _ in range(100):
        if engine_threads() == before:
            break
        time.sleep(0.05)
    assert engine_threads() == before


def test_completions_count_their_tokens(model: Transformer, tokenizer: Tokenizer) -> None:
    counts = []
    with Engine(model, tokenizer, slots=2) as engine:
        for _ in range(2):
            completion = engine.submit(Request([5] * 100, GREEDY, 7))
            tokens_of(completion)
            counts.append(
                (completion.prompt_tokens, completion.cached_tokens, completion.completion_tokens)
            )
    assert counts == [(100, 0, 7), (100, 64, 7)]


def test_no_tensor_is_in_double_precision(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apple's MPS has no float64. The engine runs on a CPU here, with every operation checked."""
    samplings = [GREEDY, RANDOM, Sampling(temperature=0.8, top_p=0.9, top_k=20, min_p=0.01)]
    samplings += [Sampling(repetition_penalty=1.2, presence_penalty=0.5, logit_bias={5: 2.0})]
    with Engine(model, tokenizer, slots=4) as engine:
        step = engine.step

        def checked_step() -> bool:
            with NoDoubles():
                return step()

        monkeypatch.setattr(engine, "step", checked_step)
        requests = [Request(list(range(3, 90)), sampling, 8, logprobs=3) for sampling in samplings]
        assert [len(tokens) for tokens in generate(engine, *requests)] == [8] * 4
