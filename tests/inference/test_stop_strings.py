"""Stop strings and streamed text, tested through the engine."""

import random

import pytest

from minimind.inference.engine import Engine
from minimind.inference.requests import Completion, Request
from minimind.tokenizer import Tokenizer
from tests.support.decoding import GREEDY, RANDOM, becomes_idle, text_of, tokens_of


@pytest.mark.parametrize("others", [0, 5])
def test_stop_strings_are_never_returned_in_part(
    engine: Engine, tokenizer: Tokenizer, prompts: list[list[int]], others: int
) -> None:
    rng = random.Random(others)
    request = Request(prompts[1], RANDOM, 60, seed=5)
    for other in range(others):
        engine.submit(Request(prompts[other], RANDOM, 60), lambda piece: None)
    ids = tokens_of(engine.submit(request))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    for _ in range(20):
        at = rng.randrange(1, len(text) - 6)
        # A string that occurs, one that never occurs, and one of which only the beginning occurs.
        stops = (text[at : at + rng.randrange(1, 6)], "no such text", text[at : at + 3] + "\0")
        request = Request(prompts[1], RANDOM, 60, stop=stops, seed=5, logprobs=0)
        pieces = list(engine.submit(request))
        end = text.index(stops[0])
        assert "".join(piece.text for piece in pieces) == text[:end]
        assert pieces[-1].finish_reason == "stop"
        assert all(len(piece.token_ids) == len(piece.logprobs) for piece in pieces)
        token_ids = [token for piece in pieces for token in piece.token_ids]
        assert token_ids == ids[: len(token_ids)]
        covered = tokenizer.decode(token_ids, skip_special_tokens=True).rstrip("\ufffd")
        assert covered.startswith(text[:end].rstrip("\ufffd")) or not text[:end]
    never = Request(prompts[1], RANDOM, 60, stop=(text[-4:] + "\0", "", text[3:9] + "\0"), seed=5)
    assert text_of(engine.submit(never)) == text


def test_streamed_text_is_the_decoded_text(
    engine: Engine, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    stops = frozenset({tokenizer.im_end, tokenizer.end_of_text})
    for seed in range(5):
        request = Request(prompts[2], RANDOM, 80, stop_ids=stops, seed=seed)
        ids = tokens_of(engine.submit(request))
        pieces = list(engine.stream_text(prompts[2], max_new_tokens=80, sampling=RANDOM, seed=seed))
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
        assert len(pieces) > 5


def test_closing_a_stream_cancels_its_request(
    engine: Engine, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[Completion] = []

    def submit(request: Request) -> Completion:
        submitted.append(Engine.submit(engine, request))
        return submitted[-1]

    monkeypatch.setattr(engine, "submit", submit)
    pieces = engine.stream_text(prompts[0], max_new_tokens=200, sampling=GREEDY)
    next(pieces)
    pieces.close()
    assert becomes_idle(engine)
    assert [completion.completion_tokens < 200 for completion in submitted] == [True]
