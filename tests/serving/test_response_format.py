"""JSON objects and JSON schemas over HTTP, with the official client."""

import json
from typing import Any, Literal

import pytest
from openai import OpenAI
from pydantic import BaseModel

MESSAGES: Any = [{"role": "user", "content": "长江有多长？"}]


class River(BaseModel):
    name: Literal["长江", "黄河"]
    kilometres: int
    is_long: bool | None


def ask(client: OpenAI, **settings: Any) -> Any:
    defaults = {"model": "tiny", "messages": MESSAGES, "temperature": 1.5, "max_tokens": 200}
    return client.chat.completions.create(**defaults | settings).choices[0]


def json_schema(schema: dict[str, Any], strict: bool | None) -> dict[str, Any]:
    described = {"name": "answer", "schema": schema, "strict": strict}
    return {"type": "json_schema", "json_schema": described}


def test_json_is_complete_unless_finish_reason_is_length(client: OpenAI) -> None:
    reasons = set()
    for seed in range(12):
        choice = ask(
            client, response_format={"type": "json_object"}, seed=seed, max_tokens=2 + 10 * seed
        )
        reasons.add(choice.finish_reason)
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        else:
            with pytest.raises(json.JSONDecodeError):
                json.loads(choice.message.content)
    assert "length" in reasons


@pytest.mark.parametrize("strict", [True, False, None])
def test_an_answer_follows_its_schema(client: OpenAI, strict: bool | None) -> None:
    schema = {
        "type": "object",
        "properties": {"river": {"enum": ["长江", "黄河"]}, "long": {"type": "boolean"}},
        "required": ["river", "long"],
        "additionalProperties": False,
    }
    for seed in range(4):
        choice = ask(client, response_format=json_schema(schema, strict), seed=seed)
        assert choice.finish_reason == "stop"
        value = json.loads(choice.message.content)
        assert list(value) == ["river", "long"]
        assert value["river"] in ("长江", "黄河")
        assert isinstance(value["long"], bool)


def test_pydantic_models_with_the_official_client(client: OpenAI) -> None:
    done = client.chat.completions.parse(
        model="tiny",
        messages=MESSAGES,
        temperature=1.5,
        seed=3,
        response_format=River,
        logprobs=True,
    )
    river = done.choices[0].message.parsed
    assert isinstance(river, River)
    assert done.choices[0].finish_reason == "stop"
    logprobs = done.choices[0].logprobs
    assert logprobs
    assert logprobs.content
    written = b"".join(bytes(token.bytes or []) for token in logprobs.content)
    assert written.decode() == done.choices[0].message.content


def test_streams_and_choices_follow_the_schema(client: OpenAI) -> None:
    response_format = json_schema(
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 4}, True
    )
    texts = {0: "", 1: "", 2: ""}
    reasons = {}
    for chunk in client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        temperature=1.5,
        seed=1,
        n=3,
        stream=True,
        response_format=response_format,  # type: ignore[arg-type]
    ):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert set(reasons.values()) == {"stop"}
    assert all(isinstance(value, bool) for text in texts.values() for value in json.loads(text))


def test_schema_is_optional_and_text_is_unconstrained(client: OpenAI) -> None:
    anything = {"type": "json_schema", "json_schema": {"name": "anything"}}
    assert ask(client, response_format=anything, max_tokens=5).message.content.startswith("{")
    free = ask(client, response_format={"type": "text"}, temperature=0, max_tokens=20)
    assert free == ask(client, temperature=0, max_tokens=20)


def test_sampling_parameters_combine_with_a_schema(client: OpenAI) -> None:
    """Bias and penalties affect the choice among allowed tokens only."""
    response_format = json_schema({"enum": ["长江", "黄河", "泰山"]}, True)
    settings: dict[str, Any] = {"repetition_penalty": 3.0, "top_k": 1, "min_p": 0.5}
    for seed in range(4):
        choice = ask(
            client,
            response_format=response_format,
            seed=seed,
            logit_bias={"300": 100},
            frequency_penalty=2,
            extra_body=settings,
        )
        assert json.loads(choice.message.content) in ("长江", "黄河", "泰山")
