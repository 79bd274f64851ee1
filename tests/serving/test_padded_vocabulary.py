"""A model with more embedding rows than its tokenizer has tokens, over HTTP."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from minimind.model import save_model
from minimind.serving.limits import Limits
from minimind.tokenizer import Tokenizer
from tests.support.services import InProcess, make_model

PADDING = 8


@pytest.fixture(scope="module", params=["qwen3", "tinyllama"])
def service(
    request: pytest.FixtureRequest,
    foreign_dir: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[InProcess]:
    """A service of a model that prefers rows without a token."""
    tokenizer = Tokenizer.load(foreign_dir(request.param))
    folder = tmp_path_factory.mktemp("padded")
    model = make_model(tokenizer, seed=1, context=512, padding=PADDING)
    save_model(folder / "tiny", model, tokenizer)
    with InProcess(folder, 4, Limits(), ()) as running:
        yield running


def post(service: InProcess, route: str, **settings: Any) -> Any:
    body = {"model": "tiny", "max_tokens": 40, "seed": 3} | settings
    answer = httpx.post(f"{service.url}/v1/{route}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat(service: InProcess, **settings: Any) -> Any:
    messages = [{"role": "user", "content": "长江有多长？"}]
    return post(service, "chat/completions", messages=messages, **settings)


@pytest.mark.parametrize("temperature", [0, 1, 2])
def test_json_mode(service: InProcess, temperature: float) -> None:
    json_mode = {"response_format": {"type": "json_object"}, "temperature": temperature}
    for seed in range(3):
        [choice] = chat(service, seed=seed, max_tokens=200, **json_mode)["choices"]
        content = choice["message"]["content"]
        assert content.lstrip().startswith("{")
        if choice["finish_reason"] == "stop":  # a random model may not close what it opens
            assert isinstance(json.loads(content), dict)


@pytest.mark.parametrize("temperature", [0, 1, 2])
def test_log_probabilities(service: InProcess, temperature: float) -> None:
    settings = {"temperature": temperature, "top_p": 1, "n": 4}
    for choice in chat(service, logprobs=True, top_logprobs=20, **settings)["choices"]:
        entries = choice["logprobs"]["content"]
        assert entries
        for entry in entries:
            assert len(entry["top_logprobs"]) == 20
            assert sum(math.exp(other["logprob"]) for other in entry["top_logprobs"]) <= 1
            assert all(other["bytes"] for other in entry["top_logprobs"])
    for choice in post(service, "completions", prompt="长江", logprobs=5, **settings)["choices"]:
        assert choice["logprobs"]["tokens"]
        assert all(choice["logprobs"]["tokens"])


def test_bias_and_penalties(service: InProcess) -> None:
    settings = {"temperature": 2, "presence_penalty": 2, "frequency_penalty": -2}
    bias = {"logit_bias": {"300": 100}, "logprobs": True}
    [choice] = chat(service, **settings, **bias)["choices"]
    tokens = {entry["token"] for entry in choice["logprobs"]["content"]}
    assert len(tokens) == 1


def test_a_bias_of_an_id_without_a_token_is_refused(service: InProcess) -> None:
    [model] = service.models.values()
    beyond = model.tokenizer.vocab_size
    assert model.engine.model.vocab_size == beyond + PADDING
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
    answer = httpx.post(
        f"{service.url}/v1/chat/completions", json=body | {"logit_bias": {str(beyond): 1}}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "logit_bias"
