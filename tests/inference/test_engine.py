"""The engine: whom it serves with whom changes nothing, and nothing stays behind."""

import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch

from minimind.errors import ModelError, UsageError
from minimind.inference.engine import Engine
from minimind.inference.requests import Completion, Piece, Request, ScoreRequest
from minimind.inference.sampling import Sampling
from minimind.model import Transformer
from minimind.tokenizer import Tokenizer
from tests.support.devices import NoDoubles

GREEDY = Sampling(temperature=0)
VARIED = Sampling(temperature=1, top_p=1)
CONTEXT = 256
WORDS = ["长江", "泰山在哪里？", "The river", "黄河", "海水为什么是咸的？", "你好", "a", "b"]


@pytest.fixture(scope="module")
def engine(model: Transformer, tokenizer: Tokenizer) -> Iterator[Engine]:
    with Engine(model, tokenizer, slots=9) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(model: Transformer, tokenizer: Tokenizer) -> Iterator[Engine]:
    with Engine(model, tokenizer, slots=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """100 of many lengths."""
    rng = random.Random(0)
    return [
        tokenizer.encode("".join(rng.choices(WORDS, k=rng.randrange(1, 30)))) for _ in range(100)
    ]


def tokens_of(completion: Completion) -> list[int]:
    return [token for piece in completion for token in piece.token_ids]


def text_of(completion: Completion) -> str:
    return "".join(piece.text for piece in completion)


def write(engine: Engine, *requests: Request) -> list[list[int]]:
    """Return the tokens of each, generated together."""
    outputs = dict(engine.generate(requests))
    return [list(outputs[index].token_ids) for index in range(len(requests))]


def is_idle(engine: Engine, slots: int = 9) -> bool:
    """Within the second that a request may take to leave."""
    end = time.monotonic() + 1
    while time.monotonic() < end:
        stats = engine.stats()
        if (stats.running, stats.waiting, stats.free_slots) == (0, 0, slots):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.numeric
def test_a_step_is_the_choice_of_the_whole_text_so_far(
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


@pytest.mark.numeric
def test_greedy_tokens_are_the_same_alone_and_among_others(
    engine: Engine, alone: Engine, prompts: list[list[int]]
) -> None:
    """Row 24 of the reliability figures: 100 prompts alone, and each among 8 others."""
    requests = [Request(prompt, GREEDY, 24) for prompt in prompts]
    wanted = write(alone, *requests)
    assert write(engine, *requests) == wanted
    assert len({tuple(tokens) for tokens in wanted}) > 80
    assert is_idle(engine)


def test_half_of_the_requests_are_cut_off_and_nothing_stays_behind(
    engine: Engine, alone: Engine, prompts: list[list[int]]
) -> None:
    """Row 23, without HTTP: they come at random times and half leave at a random token."""
    rng = random.Random(3)
    wanted = {i: tokens_of(alone.submit(Request(prompts[i], GREEDY, 30))) for i in range(0, 100, 2)}
    pieces: dict[int, list[Piece]] = defaultdict(list)
    completions: dict[int, Completion] = {}
    limits = {i: rng.randrange(0, 25) for i in range(1, 100, 2)}

    def deliver(number: int, piece: Piece) -> None:
        pieces[number].append(piece)
        own = completions.get(number)
        if number % 2 and own is not None and own.completion_tokens >= limits[number]:
            own.cancel()

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
    assert is_idle(engine)
    for number, told in pieces.items():
        assert [p.finish_reason for p in told[:-1]] == [None] * (len(told) - 1)
        tokens = [token for piece in told for token in piece.token_ids]
        if number % 2 == 0:
            assert told[-1].finish_reason == "length"
            assert tokens == wanted[number]
        else:
            # Tokens without text are not delivered, so that a few are not cut off in time.
            assert told[-1].finish_reason in ("cancelled", "length")
    assert sum(told[-1].finish_reason == "cancelled" for told in pieces.values()) > 40
    memory = engine.model.cache.data.data_ptr()
    assert tokens_of(engine.submit(Request(prompts[0], GREEDY, 30))) == wanted[0]
    assert engine.model.cache.data.data_ptr() == memory


def test_first_come_first_served(model: Transformer, tokenizer: Tokenizer) -> None:
    begun: list[int] = []
    with Engine(model, tokenizer, slots=2) as engine:
        completions = [
            engine.submit(Request([i + 1], GREEDY, 3), lambda p, n=i: begun.append(n))
            for i in range(12)
        ]
        while begun.count(11) < 3:
            time.sleep(0.01)
        assert [c.completion_tokens for c in completions] == [3] * 12
    first = sorted(range(12), key=begun.index)
    assert all(abs(place - number) <= 1 for place, number in enumerate(first))  # two at a time


def test_running_texts_go_on_while_a_long_prompt_is_read(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    written: list[int] = []  # of the running text, as each of the others gets its first token
    with Engine(model, tokenizer, slots=8) as engine:
        running = engine.submit(Request([5], GREEDY, 250))
        next(iter(running))
        for number in range(7):  # 28 chunks, 4 of which are read in a step
            prompt = random.Random(number).choices(range(600), k=250)
            request = Request(prompt, GREEDY, 1)
            engine.submit(request, lambda p: written.append(running.completion_tokens))
        while len(written) < 7:
            time.sleep(0.001)
        running.cancel()
    assert written == sorted(set(written))
    assert written[-1] < 250


@pytest.mark.numeric
def test_a_prefix_that_was_read_is_not_read_again(
    engine: Engine, alone: Engine, tokenizer: Tokenizer
) -> None:
    shared = random.Random(9).choices(range(600), k=150)
    firsts = [shared + [n] * 5 for n in range(4)]
    wanted = []
    for prompt in firsts:
        tokens_of(alone.submit(Request([7] * 200, GREEDY, 1)))  # the slot holds something else
        fresh = alone.submit(Request(prompt, GREEDY, 30, logprobs=0))
        wanted.append([(p.token_ids, p.logprobs) for p in fresh])
        assert fresh.cached_tokens == 0
    tokens_of(engine.submit(Request(shared, GREEDY, 1)))
    reused = [engine.submit(Request(prompt, GREEDY, 30, logprobs=0)) for prompt in firsts]
    found = [[(p.token_ids, p.logprobs) for p in completion] for completion in reused]
    assert found == wanted  # log-probabilities too: the same bits
    assert [completion.cached_tokens for completion in reused] == [128] * 4
    # The next turn of a conversation begins with all of the turn before.
    turn = firsts[0] + [token for ids, _ in wanted[0] for token in ids] + [3, 4, 5]
    again = engine.submit(Request(turn, GREEDY, 1))
    tokens_of(again)
    assert again.cached_tokens == 128
    # A prompt that is known to its end still has a last token to be read.
    whole = engine.submit(Request(shared[:128], GREEDY, 1))
    tokens_of(whole)
    assert whole.cached_tokens == 64


def test_a_prefix_that_is_being_read_is_waited_for(engine: Engine, alone: Engine) -> None:
    shared = random.Random(10).choices(range(600), k=200)
    requests = [Request(shared + [n] * 5, GREEDY, 9) for n in range(5)]
    other = Request([n % 600 for n in range(200)], GREEDY, 9)  # which need not wait
    wanted = [tokens_of(alone.submit(request)) for request in (*requests, other)]
    completions = [engine.submit(request) for request in (*requests, other)]
    assert [tokens_of(completion) for completion in completions] == wanted
    assert [c.cached_tokens for c in completions] == [0, 192, 192, 192, 192, 0]


def test_what_is_waited_for_may_be_cancelled(model: Transformer, tokenizer: Tokenizer) -> None:
    """In the middle of its prompt: the next one reads on from there."""
    shared = random.Random(11).choices(range(600), k=250)
    with Engine(model, tokenizer, slots=2) as engine:
        writing = engine.submit(Request([5], GREEDY, 250))  # so that few chunks are read at once
        next(iter(writing))
        first = engine.submit(Request([*shared, 1], GREEDY, 3))
        second = engine.submit(Request([*shared, 2], GREEDY, 3))
        first.cancel()
        assert len(tokens_of(second)) == 3
        writing.cancel()
    assert first.completion_tokens <= 3


def score(model: Transformer, prompt: list[int], end: list[int]) -> float:
    with torch.inference_mode():
        logits = model.logits(model(torch.tensor([prompt + end[:-1]])))[0].double()
    rows = logits.log_softmax(-1)[len(prompt) - 1 :]
    return float(rows[range(len(end)), end].sum())


@pytest.mark.numeric
def test_ends_are_weighed_while_others_are_written(
    engine: Engine, alone: Engine, model: Transformer, prompts: list[list[int]]
) -> None:
    rng = random.Random(12)
    scorings, lengths = [], (1, 1, 2, 2, 70)
    for prompt in prompts[:20]:
        ends = [rng.choices(range(600), k=k) for k in lengths]
        ends.append([ends[2][0], 7])  # differs from another end in its last token alone
        scorings.append(ScoreRequest(prompt, ends))
    requests = [Request(prompt, GREEDY, 20) for prompt in prompts[10:30]]
    wanted = [tokens_of(alone.submit(request)) for request in requests]
    solo = [scores_of(alone.submit(scoring)) for scoring in scorings]
    mixed = [engine.submit(one) for pair in zip(scorings, requests, strict=True) for one in pair]
    assert [scores_of(completion) for completion in mixed[::2]] == solo  # the same bits
    assert [tokens_of(completion) for completion in mixed[1::2]] == wanted
    for scoring, scores in zip(scorings, solo, strict=True):
        expected = [score(model, list(scoring.prompt), list(end)) for end in scoring.continuations]
        assert scores == pytest.approx(expected, abs=1e-3)
    assert is_idle(engine)


def scores_of(completion: Completion) -> list[float]:
    [piece] = completion
    assert (piece.text, piece.token_ids, piece.finish_reason) == ("", (), "stop")
    assert completion.completion_tokens == 0
    return completion.scores


def test_weighing_that_is_cancelled_or_cannot_be(engine: Engine) -> None:
    completion = engine.submit(ScoreRequest([5] * 200, [[6] * 50] * 200))
    completion.cancel()
    assert [piece.finish_reason for piece in completion] == ["cancelled"]
    assert completion.scores == []
    assert len(scores_of(engine.submit(ScoreRequest([5] * CONTEXT, [[6], [7]])))) == 2
    with pytest.raises(UsageError, match=f"the text has {CONTEXT + 1} tokens before its last"):
        engine.submit(ScoreRequest([5] * CONTEXT, [[6], [6, 7]]))
    with pytest.raises(UsageError, match="continuation: token ids go from 0 to 599"):
        engine.submit(ScoreRequest([5], [[6], [600]]))
    assert is_idle(engine)


@pytest.mark.numeric
def test_a_seed_gives_the_same_text_whoever_is_beside_it(
    engine: Engine, alone: Engine, prompts: list[list[int]]
) -> None:
    many = Sampling(temperature=1.2, top_p=0.9, top_k=200, min_p=0.001, repetition_penalty=1.1)
    kinds = [VARIED, many, Sampling(0.7, 0.9), GREEDY]
    requests = [Request(prompts[0], kinds[i % 4], 20, seed=i // 4) for i in range(24)]
    wanted = write(alone, *requests)
    assert write(engine, *requests) == wanted
    assert write(engine, *requests[::-1]) == wanted[::-1]
    assert len({tuple(tokens) for tokens in wanted[::4]}) == 6
    unseeded = Request(prompts[0], VARIED, 20)
    assert tokens_of(engine.submit(unseeded)) != tokens_of(engine.submit(unseeded))


@pytest.mark.parametrize("beside", [0, 5])
def test_stop_strings_are_never_shown_in_part(
    engine: Engine, tokenizer: Tokenizer, prompts: list[list[int]], beside: int
) -> None:
    rng = random.Random(beside)
    whole = Request(prompts[1], VARIED, 60, seed=5)
    for other in range(beside):
        engine.submit(Request(prompts[other], VARIED, 60), lambda piece: None)
    ids = tokens_of(engine.submit(whole))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    for _ in range(20):
        at = rng.randrange(1, len(text) - 6)
        # Of several characters, mostly of several tokens; one that never comes, one that could.
        stops = (text[at : at + rng.randrange(1, 6)], "no such text", text[at : at + 3] + "\0")
        request = Request(prompts[1], VARIED, 60, stop=stops, seed=5, logprobs=0)
        pieces = list(engine.submit(request))
        end = text.index(stops[0])
        assert "".join(piece.text for piece in pieces) == text[:end]
        assert pieces[-1].finish_reason == "stop"
        assert all(len(piece.token_ids) == len(piece.logprobs) for piece in pieces)
        shown = [token for piece in pieces for token in piece.token_ids]
        assert shown == ids[: len(shown)]
        covered = tokenizer.decode(shown, skip_special_tokens=True).rstrip("\ufffd")
        assert covered.startswith(text[:end].rstrip("\ufffd")) or not text[:end]
    never = Request(prompts[1], VARIED, 60, stop=(text[-4:] + "\0", "", text[3:9] + "\0"), seed=5)
    assert text_of(engine.submit(never)) == text


def test_stop_tokens_end_a_text_and_are_not_shown(engine: Engine, prompts: list[list[int]]) -> None:
    ids = tokens_of(engine.submit(Request(prompts[0], GREEDY, 60)))
    stop = ids[20]
    completion = engine.submit(Request(prompts[0], GREEDY, 60, stop_ids=frozenset({stop})))
    pieces = list(completion)
    assert [t for p in pieces for t in p.token_ids] == ids[: ids.index(stop)]
    assert pieces[-1].finish_reason == "stop"
    assert completion.completion_tokens == ids.index(stop)
    assert completion.prompt_tokens == len(prompts[0])


@pytest.mark.numeric
def test_log_probabilities_are_those_of_a_plain_forward_pass(
    engine: Engine, model: Transformer, prompts: list[list[int]]
) -> None:
    asked = [(VARIED, 0), (GREEDY, 5), (Sampling(temperature=0.3, frequency_penalty=1), 20)]
    completions = [
        engine.submit(Request(prompts[2], sampling, 30, seed=1, logprobs=number))
        for sampling, number in asked
    ]
    for (_, number), completion in zip(asked, completions, strict=True):
        found = [entry for piece in completion for entry in piece.logprobs]
        tokens = [entry.token_id for entry in found]
        ids = torch.tensor([prompts[2] + tokens])
        with torch.inference_mode():
            scores = model.logits(model(ids))[0, len(prompts[2]) - 1 : -1].log_softmax(-1)
        own = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert len(found) == 30
        torch.testing.assert_close(torch.tensor([e.logprob for e in found]), own, atol=1e-4, rtol=0)
        assert all(len(entry.top) == number for entry in found)
        if number:
            best = scores.topk(number).values
            top = torch.tensor([[value for _, value in entry.top] for entry in found])
            torch.testing.assert_close(top, best, atol=1e-4, rtol=0)


def test_the_length_ends_at_the_limit_and_at_the_context(
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


def test_requests_that_cannot_be_are_told_before_anything_is_written(engine: Engine) -> None:
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
    with pytest.raises(UsageError, match="the prompt is empty"):  # before the first piece
        engine.stream_text([], max_new_tokens=9, sampling=GREEDY)


def test_streamed_text_is_the_decoded_text(
    engine: Engine, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    stops = frozenset({tokenizer.im_end, tokenizer.end_of_text})
    for seed in range(5):
        request = Request(prompts[2], VARIED, 80, stop_ids=stops, seed=seed)
        ids = tokens_of(engine.submit(request))
        pieces = list(engine.stream_text(prompts[2], max_new_tokens=80, sampling=VARIED, seed=seed))
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
        assert len(pieces) > 5


def test_a_stream_that_is_closed_ends(engine: Engine, prompts: list[list[int]]) -> None:
    before = engine.stats().tokens
    pieces = engine.stream_text(prompts[0], max_new_tokens=200, sampling=GREEDY)
    next(pieces)
    pieces.close()
    assert is_idle(engine)
    assert engine.stats().tokens - before < 200


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_bad_numbers_end_the_request_that_makes_them_alone(
    model: Transformer, tokenizer: Tokenizer, damage: float
) -> None:
    """One word's embedding is damaged: who reads it fails, and who takes its slot does not."""
    bad, good = 17, [[3], [4, 5], [6] * 70]
    weight = model.model.embed_tokens.weight
    kept = weight.detach().clone()
    with Engine(model, tokenizer, slots=4) as sound:
        wanted = [tokens_of(sound.submit(Request(p, GREEDY, 30))) for p in good]
    head = model.lm_head
    try:
        with torch.no_grad():  # the head stays as it was
            model.lm_head = torch.nn.Linear(*weight.shape[::-1], bias=False)
            model.lm_head.weight.copy_(kept)
            weight[bad] = damage
        with Engine(model, tokenizer, slots=4) as engine:
            healthy = [engine.submit(Request(p, GREEDY, 30)) for p in good]
            failing = engine.submit(Request([bad] * 100, VARIED, 30))
            with pytest.raises(ModelError, match="logits are not finite"):
                list(failing)
            assert [tokens_of(completion) for completion in healthy] == wanted
            for _ in range(2):  # every slot is used again
                after = [engine.submit(Request(p, GREEDY, 30)) for p in good]
                assert [tokens_of(completion) for completion in after] == wanted
    finally:
        model.lm_head = head
        with torch.no_grad():
            weight.copy_(kept)


def test_a_receiver_that_raises_ends_its_own_request_alone(
    engine: Engine, alone: Engine, prompts: list[list[int]]
) -> None:
    def broken(piece: Piece) -> None:
        raise RuntimeError("gone")

    wanted = tokens_of(alone.submit(Request(prompts[0], GREEDY, 30)))
    going = engine.submit(Request(prompts[0], GREEDY, 30))
    failing = engine.submit(Request(prompts[1], GREEDY, 200), broken)
    assert tokens_of(going) == wanted
    assert is_idle(engine)
    assert isinstance(failing.error, RuntimeError)
    assert failing.completion_tokens < 200


def test_requests_come_from_many_threads(
    engine: Engine, alone: Engine, prompts: list[list[int]]
) -> None:
    wanted = [tokens_of(alone.submit(Request(p, GREEDY, 10))) for p in prompts[:16]]
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        found[number] = tokens_of(engine.submit(Request(prompts[number], GREEDY, 10)))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(16)] == wanted


def test_closing_ends_what_runs_and_what_waits(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, slots=1)
    completions = [engine.submit(Request([5], GREEDY)) for _ in range(3)]
    next(iter(completions[0]))
    engine.close()
    for completion in completions:
        assert list(completion)[-1].finish_reason == "cancelled"
    engine.close()


def test_engines_share_one_thread(model: Transformer, tokenizer: Tokenizer) -> None:
    def decoding() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name == "minimind-engine"]

    before = decoding()  # of engines that other tests keep
    with Engine(model, tokenizer) as one, Engine(model, tokenizer) as other:
        asked = [e.submit(Request([5], GREEDY, 20)) for e in (one, other) for _ in range(3)]
        assert len({tuple(tokens_of(completion)) for completion in asked}) == 1
        assert len(decoding()) == 1
    for _ in range(100):
        if decoding() == before:
            break
        time.sleep(0.05)
    assert decoding() == before


def test_counts_are_kept(model: Transformer, tokenizer: Tokenizer) -> None:
    with Engine(model, tokenizer, slots=2) as engine:
        for _ in range(2):
            tokens_of(engine.submit(Request([5] * 100, GREEDY, 7)))
        stats = engine.stats()
    assert (stats.requests, stats.prompt_tokens, stats.cached_tokens, stats.tokens) == (
        2,
        200,
        64,
        14,
    )


def test_nothing_is_in_double_precision(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which Apple's MPS does not have. The engine runs on a CPU here, and is watched."""
    samplings = [GREEDY, VARIED, Sampling(temperature=0.8, top_p=0.9, top_k=20, min_p=0.01)]
    samplings += [Sampling(repetition_penalty=1.2, presence_penalty=0.5, logit_bias={5: 2.0})]
    with Engine(model, tokenizer, slots=4) as engine:
        turn = engine.step

        def watched() -> bool:
            with NoDoubles():
                return turn()

        monkeypatch.setattr(engine, "step", watched)
        requests = [Request(list(range(3, 90)), one, 8, logprobs=3) for one in samplings]
        assert [len(tokens) for tokens in write(engine, *requests)] == [8] * 4
