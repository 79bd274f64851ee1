"""Models with more embedding rows than tokens, such as Qwen3-0.6B."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minimind.errors import UsageError
from minimind.evaluation.scoring import EngineScorer, Row
from minimind.inference.engine import Engine
from minimind.inference.generate import generate_all
from minimind.inference.requests import Piece, Request, ScoreRequest
from minimind.inference.sampling import Sampling
from minimind.model import Transformer
from minimind.tokenizer import Tokenizer
from tests.support.decoding import GREEDY
from tests.support.services import make_model

PADDING = 8


@pytest.fixture(scope="module", params=["padded", "padded, with a gap"])
def tokenizer(
    request: pytest.FixtureRequest,
    foreign_dir: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Tokenizer:
    """A foreign tokenizer; with a gap, an id in the middle has no token."""
    directory = foreign_dir("qwen3")
    if request.param == "padded":
        return Tokenizer.load(directory)
    content = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    last = "".join(content["model"]["merges"].pop())  # no later merge depends on the last one
    del content["model"]["vocab"][last]
    copy = tmp_path_factory.mktemp("gap")
    for path in directory.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return Tokenizer.load(copy)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    model = make_model(tokenizer, seed=1, context=256, padding=PADDING)
    with torch.no_grad():
        gaps = sorted(set(range(tokenizer.vocab_size)) - tokenizer.token_ids)
        model.head_weight[gaps] *= 3
    return model.eval()


@pytest.fixture(scope="module")
def engine(model: Transformer, tokenizer: Tokenizer) -> Iterator[Engine]:
    with Engine(model, tokenizer, slots=4) as engine:
        yield engine


def pieces_of(engine: Engine, prompt: list[int], sampling: Sampling, **more: object) -> list[Piece]:
    return list(engine.submit(Request(prompt, sampling, 40, **more)))  # type: ignore[arg-type]


def all_logprobs(model: Transformer, ids: list[int]) -> Tensor:
    """Return log-probabilities over all embedding rows, as transformers does: [len(ids), rows]."""
    with torch.inference_mode():
        return model.logits(model(torch.tensor([ids])))[0].log_softmax(-1)


def test_the_fixture_prefers_ids_without_a_token(model: Transformer, tokenizer: Tokenizer) -> None:
    best = all_logprobs(model, tokenizer.encode("长江" * 20)).argmax(-1).tolist()
    assert sum(token not in tokenizer.token_ids for token in best) > 5
    assert model.config.vocab_size == tokenizer.vocab_size + PADDING


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(temperature=1, top_p=1),
        Sampling(temperature=100, top_p=1),
        Sampling(temperature=100, top_p=0.9, top_k=10_000, min_p=0.001),
        Sampling(temperature=2, repetition_penalty=1.3, presence_penalty=2, frequency_penalty=-2),
        Sampling(temperature=0, logit_bias={5: 100, 6: -100}),
    ],
)
def test_ids_without_a_token_are_never_sampled_or_listed(
    engine: Engine, tokenizer: Tokenizer, sampling: Sampling
) -> None:
    for seed in range(5):
        prompt = tokenizer.encode("长江")
        pieces = pieces_of(engine, prompt, sampling, seed=seed, logprobs=20)
        assert pieces[-1].finish_reason == "length"
        entries = [entry for piece in pieces for entry in piece.logprobs]
        assert len(entries) == 40
        for entry in entries:
            assert {entry.token_id, *(token for token, _ in entry.top)} <= tokenizer.token_ids
            assert len(entry.top) == 20


def test_logprobs_are_normalized_over_all_rows(
    engine: Engine, model: Transformer, tokenizer: Tokenizer
) -> None:
    """As in transformers, vLLM and lm-eval."""
    prompt = tokenizer.encode("长江是中国")
    pieces = pieces_of(engine, prompt, GREEDY, logprobs=5)
    entries = [entry for piece in pieces for entry in piece.logprobs]
    sampled = [entry.token_id for entry in entries]
    expected = all_logprobs(model, prompt + sampled)[len(prompt) - 1 : -1]
    own = expected.gather(1, torch.tensor(sampled)[:, None])[:, 0]
    actual = torch.tensor([entry.logprob for entry in entries])
    torch.testing.assert_close(actual, own, atol=1e-4, rtol=0)
    tokens = torch.tensor(sorted(tokenizer.token_ids))
    top = torch.tensor([[value for _, value in entry.top] for entry in entries])
    torch.testing.assert_close(top, expected[:, tokens].topk(5).values, atol=1e-4, rtol=0)
    assert sampled == tokens[expected[:, tokens].argmax(-1)].tolist()


def test_scores_are_normalized_over_all_rows(
    engine: Engine, model: Transformer, tokenizer: Tokenizer
) -> None:
    prompt = tokenizer.encode("长江")
    continuations = [tokenizer.encode(text) for text in ("是", "的河流")]
    completion = engine.submit(ScoreRequest(prompt, continuations))
    assert [piece.finish_reason for piece in completion] == ["stop"]
    expected = []
    for tokens in continuations:
        rows = all_logprobs(model, prompt + tokens[:-1])[len(prompt) - 1 :]
        expected.append(float(rows[range(len(tokens)), tokens].sum()))
    assert completion.scores == pytest.approx(expected, abs=1e-4)
    rows = [Row((*prompt, *tokens), len(prompt)) for tokens in continuations]
    [(_, scores)] = EngineScorer(model, tokenizer).score([(None, rows)])
    assert scores == pytest.approx(expected, abs=1e-4)


def test_batch_generation_returns_known_tokens_only(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    prompts = [tokenizer.encode(text) for text in ("长江", "黄河", "泰山")]
    for output in generate_all(model, tokenizer, prompts, max_new_tokens=20):
        assert output
        assert set(output) <= tokenizer.token_ids


class Only:
    """A constraint that allows a few tokens, with a mask of the given width."""

    def __init__(self, tokens: list[int], width: int) -> None:
        self.mask = torch.zeros(width, dtype=torch.bool)
        self.mask[tokens] = True
        self.is_met = self.is_stuck = False

    def wait(self, seconds: float) -> bool:
        return True

    def allowed(self) -> Tensor:
        return self.mask

    def advance(self, token: int) -> None:
        assert self.mask[token]


@pytest.mark.parametrize("width", ["tokens", "rows"])
def test_a_mask_covers_the_tokenizer_or_all_embedding_rows(
    engine: Engine, tokenizer: Tokenizer, width: str
) -> None:
    sizes = {"tokens": tokenizer.vocab_size, "rows": engine.model.vocab_size}
    constraint = Only([5, 7], sizes[width])
    pieces = pieces_of(engine, [9], Sampling(temperature=100, top_p=1), constraint=constraint)
    assert pieces[-1].finish_reason == "length"
    assert {token for piece in pieces for token in piece.token_ids} == {5, 7}


def test_ids_outside_the_vocabulary_are_refused(engine: Engine, tokenizer: Tokenizer) -> None:
    beyond = tokenizer.vocab_size
    for request, name in (
        (Request([5], Sampling(logit_bias={beyond: 1})), "logit_bias"),
        (Request([beyond], GREEDY), "prompt"),
        (ScoreRequest([5], [[beyond]]), "continuation"),
    ):
        with pytest.raises(UsageError, match=f"{name}: token ids go from 0 to {beyond - 1}"):
            engine.submit(request)
