from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from minimind.errors import ModelError, UsageError
from minimind.inference.generate import generate, stream, stream_text
from minimind.inference.sampling import Sampling
from minimind.model import Transformer
from minimind.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0)
VARIED = Sampling(temperature=1, top_p=1)
PROMPTS = ["长江", "泰山在哪里？", "The river", "黄河", "海水为什么是咸的？", "你好", "a", "b"]


def one(model: Transformer, prompt: list[int], **settings: object) -> list[int]:
    given = dict(max_new_tokens=60, sampling=GREEDY, stop_ids=set()) | settings
    return list(stream(model, prompt, **given))


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Some of equal length, some not."""
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


def test_a_step_is_the_choice_of_the_whole_text_so_far(
    model: Transformer, prompts: list[list[int]]
) -> None:
    ids = list(prompts[0])
    for token in one(model, prompts[0]):
        with torch.inference_mode():
            assert model.logits(model(torch.tensor([ids]))[0, -1]).argmax().item() == token
        ids.append(token)
    assert len(set(ids)) > 10


def test_many_at_once_are_as_one_by_one(model: Transformer, prompts: list[list[int]]) -> None:
    alone = [one(model, prompt) for prompt in prompts]
    assert len({len(prompt) for prompt in prompts}) < len(prompts)
    together = generate(model, prompts, max_new_tokens=60, sampling=GREEDY, stop_ids=set())
    assert together == alone
    # Each stops for itself, at the first token that stops.
    stops = {alone[0][7], alone[3][20], alone[7][3]}
    cut = [
        tokens[: next((i for i, token in enumerate(tokens) if token in stops), 60)]
        for tokens in alone
    ]
    assert len({len(tokens) for tokens in cut}) > 2
    together = generate(model, prompts, max_new_tokens=60, sampling=GREEDY, stop_ids=stops)
    assert together == cut
    assert [one(model, prompt, stop_ids=stops) for prompt in prompts] == cut


def test_a_seed_gives_the_same_text(model: Transformer, prompts: list[list[int]]) -> None:
    texts = [one(model, prompts[1], sampling=VARIED, seed=seed) for seed in (7, 7, 8, None, None)]
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts[1:]}) == 4
    batches = [
        generate(model, prompts, max_new_tokens=20, sampling=VARIED, stop_ids=set(), seed=7)
        for _ in range(2)
    ]
    assert batches[0] == batches[1]


def test_the_length_ends_at_the_limit_and_at_the_context(
    model: Transformer, prompts: list[list[int]]
) -> None:
    context = model.config.max_position_embeddings
    assert len(one(model, prompts[0], max_new_tokens=1)) == 1
    long = (prompts[0] * context)[: context - 3]
    assert len(one(model, long)) == 3
    assert len(generate(model, [long], max_new_tokens=9, sampling=GREEDY, stop_ids=set())[0]) == 3
    assert generate(model, [], max_new_tokens=9, sampling=GREEDY, stop_ids=set()) == []


def test_prompts_that_cannot_be_are_told_before_anything_is_written(
    model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    context = model.config.max_position_embeddings
    for prompt, message in [
        ([], "the prompt is empty"),
        ([5] * context, f"the prompt has {context} tokens and the model's context is {context}"),
    ]:
        with pytest.raises(UsageError, match=message):
            stream(model, prompt, max_new_tokens=9, sampling=GREEDY, stop_ids=set())
        with pytest.raises(UsageError, match=message):
            stream_text(model, tokenizer, prompt, max_new_tokens=9, sampling=GREEDY)
        with pytest.raises(UsageError, match=message):
            generate(model, [*prompts, prompt], max_new_tokens=9, sampling=GREEDY, stop_ids=set())


def test_tokens_come_one_by_one(
    model: Transformer, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: steps.append(1) or logits(hidden))
    tokens = stream(model, prompts[0], max_new_tokens=60, sampling=GREEDY, stop_ids=set())
    assert isinstance(tokens, Iterator)
    assert not steps
    assert len(list(islice(tokens, 3))) == len(steps) == 3
    assert not torch.is_inference_mode_enabled()


def test_streamed_text_is_the_decoded_text(
    model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    for seed in range(5):
        settings = dict(max_new_tokens=80, sampling=VARIED, seed=seed)
        stops = {tokenizer.im_end, tokenizer.end_of_text}
        tokens = one(model, prompts[2], stop_ids=stops, **settings)
        pieces = list(stream_text(model, tokenizer, prompts[2], **settings))
        assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
        assert len(pieces) > 5


@pytest.mark.parametrize("sampling", [GREEDY, VARIED])
@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_damaged_weights_are_told(
    model: Transformer, prompts: list[list[int]], sampling: Sampling, damage: float
) -> None:
    weight = model.model.norm.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[3] = damage
        with pytest.raises(ModelError, match="scores that are not numbers"):
            one(model, prompts[0], sampling=sampling)
    finally:
        with torch.no_grad():
            weight.copy_(before)
