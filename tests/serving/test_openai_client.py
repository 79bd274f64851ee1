"""The official client against a real process: answers, streams, n, seed, usage."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from minimind.inference.engine import Engine
from minimind.inference.load import load_for_inference
from minimind.inference.requests import Request
from minimind.inference.sampling import Sampling
from minimind.tokenizer import encode_chat
from tests.support.clients import MESSAGES, ask


def test_models_are_listed(client: OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == ["other", "tiny"]
    assert client.models.retrieve("tiny") == models[1]
    assert models[1].object == "model"
    assert models[1].owned_by == "minimind"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("unknown")
    assert caught.value.code == "model_not_found"


def test_answers_equal_the_output_of_the_engine(client: OpenAI, models_dir: Path) -> None:
    done = ask(client)
    model, tokenizer = load_for_inference(models_dir / "tiny", "cpu")
    prompt, _ = encode_chat(tokenizer, MESSAGES, add_generation_prompt=True)
    engine = Engine(model, tokenizer, slots=1)
    stop_ids = frozenset({tokenizer.im_end, tokenizer.end_of_text})
    request = Request(prompt, Sampling(temperature=0), max_new_tokens=20, stop_ids=stop_ids)
    expected = "".join(piece.text for piece in engine.submit(request))
    engine.close()
    [choice] = done.choices
    assert choice.message.content == expected
    assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", "length", 0)
    assert done.usage.prompt_tokens == len(prompt)
    assert (done.usage.completion_tokens, done.usage.total_tokens) == (20, len(prompt) + 20)
    assert done.object == "chat.completion"
    assert done.model == "tiny"
    assert done.id.startswith("chatcmpl-")
    assert done.system_fingerprint.startswith("fp_")
    assert done.system_fingerprint != ask(client, model="other").system_fingerprint
    assert done._request_id.startswith("req_")


def test_streams_have_openai_format(client: OpenAI) -> None:
    complete = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    first, *middle, last, usage = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert all(c.choices[0].delta.role is None and c.choices[0].delta.content for c in middle)
    assert all(c.choices[0].finish_reason is None for c in [first, *middle])
    text = "".join(c.choices[0].delta.content for c in middle)
    assert text == complete.choices[0].message.content
    assert len(middle) > 5  # one per piece of text
    assert last.choices[0].delta.model_dump(exclude_none=True) == {}
    assert last.choices[0].finish_reason == "length"
    assert usage.choices == []
    assert usage.usage.completion_tokens == complete.usage.completion_tokens
    assert usage.usage.prompt_tokens == complete.usage.prompt_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({(c.id, c.created, c.model, c.system_fingerprint, c.object) for c in chunks}) == 1
    assert first.object == "chat.completion.chunk"
    assert [c.usage for c in ask(client, stream=True)][-1] is None  # only if requested


def test_the_events_of_a_stream_byte_by_byte(process: Any) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 3, "stream": True}
    response = httpx.post(f"{process.url}/v1/chat/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    raw = response.content.decode()
    *events, done, end = raw.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") and "\n" not in event for event in events)
    choice = json.loads(events[0][6:])["choices"][0]
    assert choice["finish_reason"] is None  # present, and null
    assert choice["logprobs"] is None


def test_choices_have_different_seeds(client: OpenAI) -> None:
    settings: dict[str, Any] = {"n": 3, "seed": 5, "temperature": 1.5}
    settings |= {"max_completion_tokens": 12, "logprobs": True}
    first, again = (ask(client, max_tokens=None, **settings) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in again.choices]
    other = ask(client, **settings | {"seed": 900}, max_tokens=None)
    assert texts[0] != other.choices[0].message.content
    num_tokens = sum(len(choice.logprobs.content) for choice in first.choices)
    assert first.usage.completion_tokens == num_tokens  # of all three; the prompt counts once
    assert first.usage.prompt_tokens == other.usage.prompt_tokens == ask(client).usage.prompt_tokens
    streamed = ["", "", ""]
    for chunk in ask(client, stream=True, max_tokens=None, **settings):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_stop_strings_are_not_returned(client: OpenAI) -> None:
    text = ask(client).choices[0].message.content
    stop = text[7:9]
    for stops in (stop, ["absent", stop]):
        done = ask(client, stop=stops)
        assert done.choices[0].message.content == text[: text.index(stop)]
        assert done.choices[0].finish_reason == "stop"
        chunks = list(ask(client, stop=stops, stream=True))
        streamed = "".join(c.choices[0].delta.content or "" for c in chunks)
        assert streamed == done.choices[0].message.content
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_chat_logprobs_match_the_text_and_the_stream(client: OpenAI) -> None:
    done = ask(client, logprobs=True, top_logprobs=3)
    tokens = done.choices[0].logprobs.content
    assert len(tokens) == 20
    for token in tokens:
        assert token.logprob == max(other.logprob for other in token.top_logprobs)  # greedy
        assert len(token.top_logprobs) == 3
        assert token.logprob <= 0
    text = b"".join(bytes(token.bytes) for token in tokens)
    assert text.decode(errors="replace") == done.choices[0].message.content
    without_top = ask(client, logprobs=True).choices[0].logprobs.content
    assert [token.logprob for token in without_top] == [token.logprob for token in tokens]
    assert all(token.top_logprobs == [] for token in without_top)
    streamed = [
        token
        for chunk in ask(client, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert streamed == tokens
    assert ask(client).choices[0].logprobs is None


def test_logit_bias_bans_and_forces(client: OpenAI) -> None:
    tokens = ask(client, logprobs=True).choices[0].logprobs.content
    forced = ask(client, logit_bias={"300": 100}, max_tokens=4, logprobs=True)
    generated = forced.choices[0].logprobs.content
    assert len({tuple(token.bytes) for token in generated}) == 1
    assert generated[0].bytes != tokens[0].bytes
    banned = ask(client, logit_bias={"300": -100}, max_tokens=20, logprobs=True)
    assert all(token.bytes != generated[0].bytes for token in banned.choices[0].logprobs.content)


def test_max_tokens_of_minus_one_is_no_limit(client: OpenAI) -> None:
    done = ask(client, max_tokens=-1)
    assert done.choices[0].finish_reason == "length"
    assert done.usage.total_tokens == 2048


def test_developer_messages_and_text_parts_are_accepted(client: OpenAI) -> None:
    parts = [
        {"role": "developer", "content": "你是向导"},
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("长江", "有多长？")]},
    ]
    assert ask(client, messages=parts).choices == ask(client).choices
    answer = ask(client).choices[0].message
    again = [*MESSAGES, answer.model_dump(), {"role": "user", "content": "然后呢？"}]
    assert ask(client, messages=again).choices[0].message.content


def test_text_completions(client: OpenAI) -> None:
    settings: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 8}
    done = client.completions.create(prompt="长江", **settings)
    assert done.object == "text_completion"
    assert done.choices[0].finish_reason == "length"
    both = client.completions.create(prompt=["长江", "黄河"], echo=True, **settings)
    assert both.choices[0].text == "长江" + done.choices[0].text
    assert both.choices[1].text.startswith("黄河")
    assert both.usage
    assert both.usage.completion_tokens == 16
    chunks = list(client.completions.create(prompt="长江", stream=True, **settings))
    assert "".join(chunk.choices[0].text for chunk in chunks) == done.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    with_logprobs = client.completions.create(prompt="长江", logprobs=2, **settings).choices[0]
    logprobs = with_logprobs.logprobs
    assert logprobs
    assert logprobs.tokens
    assert logprobs.token_logprobs
    assert logprobs.top_logprobs
    assert logprobs.text_offset
    assert len(logprobs.tokens) == len(logprobs.text_offset) == 8
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen == max(top.values())
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    chunks = list(client.completions.create(prompt="长江", logprobs=2, stream=True, **settings))
    streamed = [chunk.choices[0].logprobs for chunk in chunks]
    offsets = [at for logprobs in streamed if logprobs for at in logprobs.text_offset or ()]
    assert offsets == logprobs.text_offset
    for unset in ({}, {"max_tokens": None}):
        usage = client.completions.create(model="tiny", prompt="长江", temperature=0, **unset).usage
        assert usage
        assert usage.completion_tokens == 16


def test_prompts_may_be_token_ids(client: OpenAI, tokenizer: Any) -> None:
    settings: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 8}
    ids = tokenizer.encode("长江")
    text = client.completions.create(prompt="长江", **settings).choices[0].text
    assert client.completions.create(prompt=ids, **settings).choices[0].text == text
    both = client.completions.create(prompt=[ids, ids], **settings)
    assert [choice.text for choice in both.choices] == [text, text]
    with pytest.raises(openai.BadRequestError, match="token id"):
        client.completions.create(prompt=[100_000], **settings)


def test_concurrent_clients_get_equal_answers(process: Any, client: OpenAI) -> None:
    expected = ask(client).choices[0].message.content

    async def stream(client: AsyncOpenAI) -> str:
        text = ""
        async for chunk in await client.chat.completions.create(
            model="tiny", messages=MESSAGES, temperature=0, max_tokens=20, stream=True
        ):
            text += chunk.choices[0].delta.content or ""
        return text

    async def stream_all() -> list[str]:
        url = f"{process.url}/v1"
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(stream(client) for _ in range(24)))

    assert asyncio.run(stream_all()) == [expected] * 24


def test_truncation_drops_the_oldest_turns(client: OpenAI) -> None:
    long = [MESSAGES[0], *[{"role": "user", "content": "长江" * 100}] * 40, MESSAGES[1]]
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        ask(client, messages=long)
    raw = client.chat.completions.with_raw_response
    answer = ask(raw_of(raw), messages=long, extra_body={"truncation": "auto"})
    left_out = int(answer.headers["minimind-left-out"])
    assert 0 < left_out < 40
    same = [MESSAGES[0], *long[1 + left_out :]]
    expected = ask(raw_of(raw), messages=same, extra_body={"truncation": "auto"})
    assert "minimind-left-out" not in expected.headers
    assert answer.parse().choices == expected.parse().choices
    fits = [MESSAGES[0], {"role": "developer", "content": "只用中文"}, MESSAGES[1]]
    expected = ask(client, messages=fits)
    assert ask(client, messages=fits, extra_body={"truncation": "auto"}).usage == expected.usage
    too_long = [{"role": "user", "content": "长江" * 3000}]
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, messages=too_long, extra_body={"truncation": "auto"})
    assert caught.value.code == "context_length_exceeded"


def raw_of(completions: Any) -> Any:
    """Wrap completions so that `ask` accepts them as a client."""
    return SimpleNamespace(chat=SimpleNamespace(completions=completions))
