"""Default parameters: OpenAI's, unless the model's generation_config.json has its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from minimind.errors import ModelError
from minimind.model import save_model
from minimind.serving.limits import Limits
from minimind.tokenizer import Tokenizer
from tests.support.services import InProcess, make_model

NEUTRAL = {
    "temperature": 1,
    "top_p": 1,
    "top_k": 0,
    "min_p": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "n": 1,
    "stream": False,
    "logprobs": False,
}


@pytest.fixture
def serve_with(tokenizer: Tokenizer, tmp_path: Path) -> Callable[[str | None], InProcess]:
    """Return a factory of services with this text as generation_config.json of the model."""

    def make(text: str | None) -> InProcess:
        directory = tmp_path / "tiny" / "model"
        save_model(directory, make_model(tokenizer, 1, 256), tokenizer)
        path = directory / "generation_config.json"
        path.unlink() if text is None else path.write_text(text, encoding="utf-8")
        return InProcess(tmp_path / "tiny", 2, Limits(), ())

    return make


def answer(service: Any, **settings: Any) -> str:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "长江"}], "seed": 5}
    url = f"{service.url}/v1/chat/completions"
    response = httpx.post(url, json={"max_tokens": 30} | body | settings, timeout=30).json()
    return response["choices"][0]["message"]["content"]


@pytest.mark.parametrize("text", [None, "{}", '{"temperature": null, "do_sample": true}'])
def test_defaults_are_those_of_openai(text: str | None, serve_with: Callable[..., Any]) -> None:
    with serve_with(text) as service:
        assert answer(service) == answer(service, **NEUTRAL)
        assert answer(service) != answer(service, temperature=0.7, top_p=0.9)


def test_generation_config_overrides_defaults(serve_with: Callable[..., Any]) -> None:
    own = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.01}
    own |= {"repetition_penalty": 1.1}
    with serve_with(json.dumps(own | {"max_new_tokens": 7, "eos_token_id": 3})) as service:
        assert answer(service) == answer(service, **own)
        assert answer(service, top_k=None) == answer(service, **own)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "长江"}]}
        for path, request, num_tokens in (
            ("chat/completions", body, 7),
            ("chat/completions", body | {"max_tokens": 9}, 9),
            ("completions", {"model": "tiny", "prompt": "长江"}, 16),  # OpenAI's own default
        ):
            response = httpx.post(f"{service.url}/v1/{path}", json=request).json()
            assert response["usage"]["completion_tokens"] == num_tokens


def test_saved_models_have_generation_defaults(serve_here: Callable[..., Any]) -> None:
    with serve_here() as service:
        assert answer(service) == answer(service, temperature=0.7, top_p=0.9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"temperature": "0.6"}', "temperature is '0.6', not a number"),
        ('{"top_k": 2.5}', "top_k is 2.5, not an integer"),
        ('{"top_p": 0}', "top-p is 0; it must be above 0"),
        ('{"temperature": NaN}', "temperature is nan"),
        ('{"max_new_tokens": 0}', "max_new_tokens is 0; it must be 1 or more"),
        ("[]", "it is not a JSON object"),
        ("{", "Expecting"),
    ],
)
def test_invalid_defaults_are_reported_with_their_file(
    text: str, message: str, serve_with: Callable[..., Any]
) -> None:
    with pytest.raises(ModelError) as caught:
        serve_with(text)
    assert message in str(caught.value)
    assert "generation_config.json: " in str(caught.value)
