"""Log-probabilities of a prompt: what `echo` with `logprobs` needs."""

import pytest
import torch

from minimind.errors import ModelError
from minimind.inference.engine import Engine
from minimind.inference.requests import Piece, Request
from minimind.inference.sampling import Sampling
from minimind.model import Transformer
from minimind.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0)
TEXT = "长江是中国最长的河流，全长约六千三百公里。" * 8


@torch.inference_mode()
def expected_scores(model: Transformer, ids: list[int]) -> torch.Tensor:
    return model.logits(model(torch.tensor([ids])))[0].log_softmax(-1)


@pytest.mark.parametrize("length", [1, 2, 64, 65, 150])
def test_they_are_those_of_the_model(length: int, model: Transformer, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)[:length]
    scores = expected_scores(model, ids)
    with Engine(model, tokenizer, slots=2) as engine:
        asked = Request(ids, GREEDY, 3, logprobs=2, prompt_logprobs=2)
        plain = list(engine.submit(Request(ids, GREEDY, 3, logprobs=2)))
        pieces = list(engine.submit(asked))  # the cached prefix cannot be used
    found = [token for piece in pieces for token in piece.prompt_logprobs]
    assert [token.token_id for token in found] == ids[1:]
    for row, token in enumerate(found):
        assert token.logprob == pytest.approx(scores[row, ids[row + 1]].item(), abs=1e-4)
        values, places = scores[row].topk(2)
        assert [i for i, _ in token.top] == places.tolist()
        assert [p for _, p in token.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert (pieces[0].text, pieces[0].token_ids) == ("", ())  # they come before what is written
    written = [token for piece in pieces for token in piece.logprobs]
    assert [token.token_id for token in written] == [
        token.token_id for piece in plain for token in piece.logprobs
    ]


def test_nothing_need_be_written(model: Transformer, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("长江")
    with Engine(model, tokenizer, slots=1) as engine:
        for number, length in ((0, len(ids) - 1), (None, 0)):
            completion = engine.submit(Request(ids, GREEDY, 0, prompt_logprobs=number))
            pieces = list(completion)
            assert sum(len(piece.prompt_logprobs) for piece in pieces) == length
            assert pieces[-1] == Piece("", finish_reason="length")
            assert completion.completion_tokens == 0
        assert engine.stats().free_slots == 1


def test_prompts_beside_each_other_keep_their_own(model: Transformer, tokenizer: Tokenizer) -> None:
    prompts = [tokenizer.encode(TEXT)[n : 3 * n + 40] for n in range(1, 12)]
    with Engine(model, tokenizer, slots=4) as engine:
        completions = [
            engine.submit(Request(ids, GREEDY, 2, prompt_logprobs=n % 3 if n % 2 else None))
            for n, ids in enumerate(prompts)
        ]
        for n, (ids, completion) in enumerate(zip(prompts, completions, strict=True)):
            found = [token for piece in completion for token in piece.prompt_logprobs]
            if n % 2 == 0:
                assert not found
                continue
            scores = expected_scores(model, ids)
            for row, token in enumerate(found):
                assert token.logprob == pytest.approx(scores[row, ids[row + 1]].item(), abs=1e-4)
                assert len(token.top) == n % 3
            assert len(found) == len(ids) - 1


def test_scores_that_are_no_numbers_fail_the_request_alone(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode(TEXT)[:150]
    damaged = next(i for i in range(tokenizer.vocab_size) if i not in ids)
    before = model.model.embed_tokens.weight[damaged].clone()
    with torch.no_grad():
        model.model.embed_tokens.weight[damaged] = float("nan")
    try:
        with Engine(model, tokenizer, slots=2) as engine:
            bad = engine.submit(Request([*ids[:10], damaged, *ids], GREEDY, 2, prompt_logprobs=0))
            with pytest.raises(ModelError, match="not finite"):
                list(bad)
            assert engine.stats().free_slots == 2
    finally:
        with torch.no_grad():
            model.model.embed_tokens.weight[damaged] = before
