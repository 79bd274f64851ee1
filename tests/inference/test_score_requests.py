"""Log-likelihoods of continuations."""

import random

import pytest
import torch

from minimind.errors import UsageError
from minimind.inference.engine import Engine
from minimind.inference.requests import Completion, Request, ScoreRequest
from minimind.model import Transformer
from tests.support.decoding import CONTEXT, GREEDY, becomes_idle, tokens_of


def log_likelihood(model: Transformer, prompt: list[int], continuation: list[int]) -> float:
    with torch.inference_mode():
        logits = model.logits(model(torch.tensor([prompt + continuation[:-1]])))[0].double()
    rows = logits.log_softmax(-1)[len(prompt) - 1 :]
    return float(rows[range(len(continuation)), continuation].sum())


def scores_of(completion: Completion) -> list[float]:
    [piece] = completion
    assert (piece.text, piece.token_ids, piece.finish_reason) == ("", (), "stop")
    assert completion.completion_tokens == 0
    return completion.scores


@pytest.mark.numeric
def test_scores_do_not_depend_on_other_requests(
    engine: Engine, sequential_engine: Engine, model: Transformer, prompts: list[list[int]]
) -> None:
    rng = random.Random(12)
    score_requests, lengths = [], (1, 1, 2, 2, 70)
    for prompt in prompts[:20]:
        continuations = [rng.choices(range(600), k=k) for k in lengths]
        continuations.append([continuations[2][0], 7])  # shares the inputs of another continuation
        score_requests.append(ScoreRequest(prompt, continuations))
    requests = [Request(prompt, GREEDY, 20) for prompt in prompts[10:30]]
    expected_tokens = [tokens_of(sequential_engine.submit(request)) for request in requests]
    solo = [scores_of(sequential_engine.submit(request)) for request in score_requests]
    mixed = [
        engine.submit(request)
        for pair in zip(score_requests, requests, strict=True)
        for request in pair
    ]
    assert [scores_of(completion) for completion in mixed[::2]] == solo  # the same bits
    assert [tokens_of(completion) for completion in mixed[1::2]] == expected_tokens
    for request, scores in zip(score_requests, solo, strict=True):
        expected = [
            log_likelihood(model, list(request.prompt), list(tokens))
            for tokens in request.continuations
        ]
        assert scores == pytest.approx(expected, abs=1e-3)
    assert becomes_idle(engine)


def test_cancelled_and_invalid_score_requests(engine: Engine) -> None:
    completion = engine.submit(ScoreRequest([5] * 200, [[6] * 50] * 200))
    completion.cancel()
    assert [piece.finish_reason for piece in completion] == ["cancelled"]
    assert completion.scores == []
    assert len(scores_of(engine.submit(ScoreRequest([5] * CONTEXT, [[6], [7]])))) == 2
    with pytest.raises(UsageError, match=f"the text has {CONTEXT + 1} tokens before its last"):
        engine.submit(ScoreRequest([5] * CONTEXT, [[6], [6, 7]]))
    with pytest.raises(UsageError, match="continuation: token ids go from 0 to 599"):
        engine.submit(ScoreRequest([5], [[6], [600]]))
    assert becomes_idle(engine)
