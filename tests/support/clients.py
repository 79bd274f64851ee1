"""Clients of a running service: requests of the official client, disconnects, shutdown."""

import asyncio
import json
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
from openai import OpenAI

from tests.support.services import Process, serving, wait_until

MESSAGES: Any = [
    {"role": "system", "content": "你是向导"},
    {"role": "user", "content": "长江有多长？"},
]
PROMPTS = ["你好", "长江有多长？", "Why is the sea salty?", "一年有几个季节？", "1949"]
TOKENS = 40


def ask(client: OpenAI, **settings: Any) -> Any:
    """Request a greedy answer of 20 tokens from `tiny`; `settings` override parameters."""
    defaults = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 20}
    return client.chat.completions.create(**defaults | settings)


def chat_body(prompt: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": PROMPTS[prompt]}]
    settings = {"temperature": 0, "max_tokens": TOKENS, "stream": True}
    return {"model": "tiny", "messages": messages} | settings


async def stream_answer(
    client: httpx.AsyncClient, prompt: int, max_events: int | None
) -> str | None:
    """Return the complete answer, or None after disconnecting early."""
    text, events = "", 0
    async with client.stream("POST", "/v1/chat/completions", json=chat_body(prompt)) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                text += delta.get("content") or ""
                events += 1
                if events == max_events:
                    return None
    return text


async def churn(url: str, requests: int, concurrency: int, expected: list[str]) -> tuple[int, int]:
    """Send requests, half of them abandoned early; return how many were completed and abandoned.

    expected: the answer to each prompt, which every completed answer must equal.
    """
    dice = random.Random(1)
    waiting = [
        (dice.randrange(len(PROMPTS)), dice.randint(1, 20) if dice.random() < 0.5 else None)
        for _ in range(requests)
    ]
    completed = abandoned = 0

    async def send_requests(client: httpx.AsyncClient) -> None:
        nonlocal completed, abandoned
        while waiting:
            prompt, max_events = waiting.pop()
            text = await stream_answer(client, prompt, max_events)
            if text is None:
                abandoned += 1
            else:
                assert text == expected[prompt]
                completed += 1

    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=url, limits=limits, timeout=300) as client,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(concurrency):
            group.create_task(send_requests(client))
    return completed, abandoned


async def answers_alone(url: str) -> list[str]:
    """Return the answer to each prompt without concurrent requests."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        return [await stream_answer(client, prompt, None) or "" for prompt in range(len(PROMPTS))]


def metric(service: Process, name: str) -> float:
    """Return a metric of the model `tiny`."""
    metrics = httpx.get(f"{service.url}/metrics").text.splitlines()
    [line] = [line for line in metrics if line.startswith(f'minimind_{name}{{model="tiny"}}')]
    return float(line.split()[-1])


ENDLESS_BODY = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "你好"}],
    "max_tokens": -1,
    "n": 16,
    "stream": True,
    "logit_bias": {"0": -100, "2": -100},  # never end the answer
}


def read_stream(url: str, lines: list[str], started: threading.Barrier) -> None:
    with (
        httpx.Client(timeout=30) as client,
        client.stream("POST", url, json=ENDLESS_BODY) as answer,
    ):
        received = answer.iter_lines()
        lines.append(next(received))
        started.wait()
        lines.extend(line for line in received if line)


def stop_during_streams(models_dir: Path, log: Path, number: int) -> float:
    """Signal a service with open streams; return the seconds until it has exited."""
    with serving(models_dir, log, "--slots", "4") as service:
        streams: list[list[str]] = [[], [], []]
        started = threading.Barrier(len(streams) + 1)
        threads = [
            threading.Thread(
                target=read_stream, args=(f"{service.url}/v1/chat/completions", lines, started)
            )
            for lines in streams
        ]
        for thread in threads:
            thread.start()
        started.wait()
        processes = [psutil.Process(service.pid)]
        processes += processes[0].children(recursive=True)
        start_time = time.monotonic()
        service.child.send_signal(number)
        status = service.child.wait(timeout=60)
        seconds = time.monotonic() - start_time
        assert status == (0 if number == signal.SIGTERM else 130)
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        for lines in streams:  # every client received the error
            assert lines[-1] == "data: [DONE]"
            error = json.loads(lines[-2].removeprefix("data: "))["error"]
            assert error["code"] == "stopping"
        wait_until(lambda: not any(child.is_running() for child in processes))
    events = [json.loads(line)["event"] for line in log.read_text().splitlines() if line[:1] == "{"]
    assert events[-1] == "ended"
    return seconds
