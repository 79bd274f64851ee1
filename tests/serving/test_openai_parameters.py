"""Parameters of requests, with the official client: errors, unsupported ones, hints."""

from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.support.clients import MESSAGES, ask


@pytest.mark.parametrize(
    ("settings", "param", "code", "message"),
    [
        ({"model": "unknown"}, "model", "model_not_found", "Available models: other, tiny"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter", "tools"),
        ({"extra_body": {"colour": 1}}, "colour", "unknown_parameter", "colour"),
        ({"temperature": 3}, "temperature", "invalid_value", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "invalid_value", "number"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value", "max_tokens"),
        ({"n": 17}, "n", "invalid_value", "16"),
        ({"messages": []}, "messages", "invalid_value", "at least 1"),
        ({"messages": [{"role": "cook", "content": ""}]}, "messages.0.role", "invalid_value", ""),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.type",
            "invalid_value",
            "only text parts are supported",
        ),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            "messages.0.content",
            "invalid_value",
            "a string or a list of text parts",
        ),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value", "logprobs"),
        ({"max_completion_tokens": 5}, "max_tokens", "invalid_value", "differ"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value", "stream"),
        ({"logit_bias": {"60000": 1}}, "logit_bias", "invalid_value", "token id"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "invalid_value", "pattern"),
        (
            {"response_format": {"type": "xml"}},
            "response_format.type",
            "invalid_value",
            "json_object",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.name",
            "missing_required_parameter",
            "name",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format",
            "invalid_value",
            "'json_schema'",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "rivers", "schema": {"type": "river"}},
                }
            },
            "response_format",
            "invalid_value",
            "Invalid schema for response_format 'rivers': Invalid type: river.",
        ),
        (
            {"response_format": {"type": "json_object"}, "stop": ["}"]},
            "stop",
            "invalid_value",
            "Leave one of them out",
        ),
        ({"stop": ""}, "stop", "invalid_value", "at least 1 character"),
        ({"stop": 1}, "stop", "invalid_value", "a string or a list of strings"),
        ({"stop": ["a", ""]}, "stop.1", "invalid_value", "at least 1 character"),
        ({"stop": list("abcde")}, "stop", "invalid_value", "at most 4 items"),
        ({"max_tokens": -2}, "max_tokens", "invalid_value", "it must be -1"),
        (
            {"messages": [{"role": "user", "content": "长江 " * 1500}]},
            "messages",
            "context_length_exceeded",
            "maximum context length is 2,048 tokens and the prompt has 3,",
        ),
        (
            {"messages": [{"role": "user", "content": "长江" * 100_000}]},
            "messages",
            "context_length_exceeded",
            "at least",
        ),
    ],
)
def test_invalid_parameters_are_errors_of_the_format_of_openai(
    client: OpenAI, settings: dict[str, Any], param: str, code: str, message: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, **settings)
    error = caught.value
    assert error.status_code == (404 if code == "model_not_found" else 400)
    assert isinstance(error, openai.NotFoundError | openai.BadRequestError)
    assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")
    assert isinstance(error.body, dict)
    assert message in error.body["message"]
    assert set(error.body) == {"message", "type", "param", "code"}


def test_unsupported_parameters_without_effect_are_accepted(client: OpenAI) -> None:
    nothing: dict[str, Any] = {
        "tools": [],
        "tool_choice": "auto",
        "user": "a user",
        "top_p": 0,
        "reasoning_effort": "none",
        "modalities": ["text"],
        "stop": [],
    }
    assert ask(client, **nothing).choices == ask(client).choices


@pytest.mark.parametrize(
    "hint",
    [
        {"metadata": {"a": "b"}},
        {"store": True},
        {"store": None},
        {"service_tier": "flex"},
        {"prompt_cache_key": "tenant-1"},
        {"prompt_cache_retention": "24h"},
        {"safety_identifier": "user-1"},
        {"parallel_tool_calls": True},
        {"parallel_tool_calls": False},
        {"messages": [{**message, "name": "a user"} for message in MESSAGES]},
        {"messages": [{**message, "name": None} for message in MESSAGES]},
    ],
    ids=str,
)
def test_hints_change_nothing(client: OpenAI, hint: dict[str, Any]) -> None:
    assert ask(client, **hint).choices == ask(client).choices


def test_a_stream_accepts_hints(client: OpenAI) -> None:
    options = {"include_usage": None, "include_obfuscation": True}
    chunks = list(ask(client, stream=True, stream_options=options))
    assert not any("obfuscation" in chunk.model_dump(exclude_none=True) for chunk in chunks)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == ask(client).choices[0].message.content


@pytest.mark.parametrize("extra", ["reasoning_content", "refusal", "tool_calls", "audio"])
def test_received_messages_with_null_fields_are_accepted(client: OpenAI, extra: str) -> None:
    answer = {"role": "assistant", "content": "六千三百公里。"}
    more = [*MESSAGES, answer, {"role": "user", "content": "然后呢？"}]
    with_null = [*MESSAGES, answer | {extra: None}, more[-1]]
    assert ask(client, messages=with_null).choices == ask(client, messages=more).choices
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, messages=[*MESSAGES, answer | {extra: "a thought"}, more[-1]])
    assert caught.value.param == f"messages.2.{extra}"


@pytest.mark.parametrize(
    ("prompt", "param", "message"),
    [
        (["长江"] * 17, "prompt", "at most 16 items"),
        ([[1, 2]] * 17, "prompt", "at most 16 items"),
        ([], "prompt", "at least 1 item"),
        ([1, "长江"], "prompt.1", "a valid integer"),
        (["长江", 1], "prompt.1", "a valid string"),
        ([[1], ["长江"]], "prompt.1.0", "a valid integer"),
        ([[]], "prompt.0", "at least 1 item"),
        (5, "prompt", "a string, a list of strings, or one or several lists of token ids"),
        (None, "prompt", "a string, a list of strings"),
    ],
    ids=str,
)
def test_prompt_errors_match_the_type_of_the_prompt(
    client: OpenAI, prompt: Any, param: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=prompt)
    assert (caught.value.param, caught.value.code) == (param, "invalid_value")
    assert isinstance(caught.value.body, dict)
    assert message in caught.value.body["message"]


def test_the_first_error_is_reported(client: OpenAI) -> None:
    invalid = [{"role": "user", "content": [{"type": "text", "text": 5}]}]
    for settings, param in (
        ({"messages": invalid}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"temperature": 3, "n": 17}, "n"),
        ({"extra_body": {"colour": 1}, "n": 17}, "n"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, **settings)
        assert caught.value.param == param
