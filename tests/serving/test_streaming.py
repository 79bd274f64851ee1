"""Keep-alive comments of streams that have no new tokens."""

import json
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import pytest
from openai import OpenAI

from minimind.serving import streaming
from tests.support.services import wait_until


def text_body(**settings: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "长江", "temperature": 0, "max_tokens": 4} | settings


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_a_queued_stream_sends_comments(
    kind: str, serve_here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "PING_SECONDS", 0.05)
    path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
    body = text_body(stream=True)
    if kind == "chat":
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    with serve_here(slots=1) as service, httpx.Client(base_url=service.url) as client:
        engine = service.models["tiny"].engine
        endless = client.build_request(
            "POST", "/v1/completions", json=text_body(max_tokens=-1, stream=True)
        )
        first = client.send(endless, stream=True)
        wait_until(lambda: engine.stats().running == 1)
        with client.stream("POST", path, json=body) as waiting:
            lines = waiting.iter_lines()
            received: list[str] = []
            while received.count(": waiting") < 3:
                received.append(next(lines))
            assert engine.stats().waiting == 1
            first.close()  # frees the slot for the waiting request
            received += lines
    events = [line for line in received if line]
    data = [line[6:] for line in events if line.startswith("data: ")]
    assert set(events) == {": waiting", *(f"data: {line}" for line in data)}
    assert data[-1] == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in data[:-1]]
    assert [choice["finish_reason"] for choice in choices][-1] == "length"


def test_clients_ignore_comments(
    serve_here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "PING_SECONDS", 0.0)
    with serve_here() as service:
        url = f"{service.url}/v1/completions"
        raw = httpx.post(url, json=text_body(max_tokens=50, stream=True)).text
        assert ": waiting\n\n" in raw
        with OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
            complete = client.completions.create(**text_body(max_tokens=50)).choices[0].text
            chunks = client.completions.create(**text_body(max_tokens=50), stream=True)
            assert "".join(chunk.choices[0].text for chunk in chunks) == complete
