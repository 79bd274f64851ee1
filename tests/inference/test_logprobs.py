"""Log-probabilities of sampled tokens, and of prompts (for `echo` with `logprobs`)."""

import pytest
import torch

from minimind.errors import ModelError
from minimind.inference.engine import Engine
from minimind.inference.requests import Piece, Request
from minimind.inference.sampling import Sampling
from minimind.model import Transformer
from minimind.tokenizer import Tokenizer
from tests.support.decoding import GREEDY, RANDOM

TEXT = "长江是中国最长的河流，全长约六千三百公里。" * 8


@torch.inference_mode()
def all_logprobs(model: Transformer, ids: list[int]) -> torch.Tensor:
    return model.logits(model(torch.tensor([ids])))[0].log_softmax(-1)


@pytest.mark.numeric
def test_logprobs_equal_those_of_a_plain_forward_pass(
    engine: Engine, model: Transformer, prompts: list[list[int]]
) -> None:
    cases = [(RANDOM, 0), (GREEDY, 5), (Sampling(temperature=0.3, frequency_penalty=1), 20)]
    completions = [
        engine.submit(Request(prompts[2], sampling, 30, seed=1, logprobs=number))
        for sampling, number in cases
    ]
    for (_, number), completion in zip(cases, completions, strict=True):
        entries = [entry for piece in completion for entry in piece.logprobs]
        tokens = [entry.token_id for entry in entries]
        ids = torch.tensor([prompts[2] + tokens])
        with torch.inference_mode():
            scores = model.logits(model(ids))[0, len(prompts[2]) - 1 : -1].log_softmax(-1)
        own = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert len(entries) == 30
        torch.testing.assert_close(
            torch.tensor([e.logprob for e in entries]), own, atol=1e-4, rtol=0
        )
        assert all(len(entry.top) == number for entry in entries)
        if number:
            best = scores.topk(number).values
            top = torch.tensor([[value for _, value in entry.top] for entry in entries])
            torch.testing.assert_close(top, best, atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 64, 65, 150])
def test_prompt_logprobs_equal_those_of_the_model(
    length: int, model: Transformer, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode(TEXT)[:length]
    scores = all_logprobs(model, ids)
    with Engine(model, tokenizer, slots=2) as engine:
        request = Request(ids, GREEDY, 3, logprobs=2, prompt_logprobs=2)
        plain = list(engine.submit(Request(ids, GREEDY, 3, logprobs=2)))
        pieces = list(engine.submit(request))  # the cached prefix cannot be used
    entries = [token for piece in pieces for token in piece.prompt_logprobs]
    assert [token.token_id for token in entries] == ids[1:]
    for row, token in enumerate(entries):
        assert token.logprob == pytest.approx(scores[row, ids[row + 1]].item(), abs=1e-4)
        values, ids_of_top = scores[row].topk(2)
        assert [i for i, _ in token.top] == ids_of_top.tolist()
        assert [p for _, p in token.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert (pieces[0].text, pieces[0].token_ids) == ("", ())  # they come before any text
    sampled = [token for piece in pieces for token in piece.logprobs]
    assert [token.token_id for token in sampled] == [
        token.token_id for piece in plain for token in piece.logprobs
    ]


def test_prompt_logprobs_without_new_tokens(model: Transformer, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("长江")
    with Engine(model, tokenizer, slots=1) as engine:
        for number, length in ((0, len(ids) - 1), (None, 0)):
            completion = engine.submit(Request(ids, GREEDY, 0, prompt_logprobs=number))
            pieces = list(completion)
            assert sum(len(piece.prompt_logprobs) for piece in pieces) == length
            assert pieces[-1] == Piece("", finish_reason="length")
            assert completion.completion_tokens == 0
        assert len(engine._scheduler.free_slots) == 1


def test_prompts_in_a_batch_keep_their_own_logprobs(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    prompts = [tokenizer.encode(TEXT)[n : 3 * n + 40] for n in range(1, 12)]
    with Engine(model, tokenizer, slots=4) as engine:
        completions = [
            engine.submit(Request(ids, GREEDY, 2, prompt_logprobs=n % 3 if n % 2 else None))
            for n, ids in enumerate(prompts)
        ]
        for n, (ids, completion) in enumerate(zip(prompts, completions, strict=True)):
            entries = [token for piece in completion for token in piece.prompt_logprobs]
            if n % 2 == 0:
                assert not entries
                continue
            scores = all_logprobs(model, ids)
            for row, token in enumerate(entries):
                assert token.logprob == pytest.approx(scores[row, ids[row + 1]].item(), abs=1e-4)
                assert len(token.top) == n % 3
            assert len(entries) == len(ids) - 1


@pytest.mark.parametrize("max_new_tokens", [0, 2])
def test_prompt_logprobs_that_are_not_finite_fail_one_request(
    max_new_tokens: int, model: Transformer, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode(TEXT)[:150]
    damaged = next(i for i in range(tokenizer.vocab_size) if i not in ids)
    before = model.model.embed_tokens.weight[damaged].clone()
    with torch.no_grad():
        model.model.embed_tokens.weight[damaged] = float("nan")
    try:
        with Engine(model, tokenizer, slots=2) as engine:
            bad = engine.submit(
                Request([*ids[:10], damaged, *ids], GREEDY, max_new_tokens, prompt_logprobs=0)
            )
            with pytest.raises(ModelError, match="not finite"):
                list(bad)
            assert len(engine._scheduler.free_slots) == 2
            assert engine.failure is None
    finally:
        with torch.no_grad():
            model.model.embed_tokens.weight[damaged] = before
