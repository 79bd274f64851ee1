"""Clients of a running service: many that disconnect, and some that see its shutdown."""

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

from tests.support.services import Process, serving, wait_until

PROMPTS = ["你好", "长江有多长？", "Why is the sea salty?", "一年有几个季节？", "1949"]
TOKENS = 40


def asked(prompt: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": PROMPTS[prompt]}]
    settings = {"temperature": 0, "max_tokens": TOKENS, "stream": True}
    return {"model": "tiny", "messages": messages} | settings


async def listen(client: httpx.AsyncClient, prompt: int, most_events: int | None) -> str | None:
    """Return the complete answer, or None after disconnecting early."""
    text, events = "", 0
    async with client.stream("POST", "/v1/chat/completions", json=asked(prompt)) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                text += delta.get("content") or ""
                events += 1
                if events == most_events:
                    return None
    return text


async def churn(url: str, requests: int, at_once: int, alone: list[str]) -> tuple[int, int]:
    """Return the numbers of completed and of abandoned answers."""
    dice = random.Random(1)
    waiting = [
        (dice.randrange(len(PROMPTS)), dice.randint(1, 20) if dice.random() < 0.5 else None)
        for _ in range(requests)
    ]
    heard = left = 0

    async def one_after_another(client: httpx.AsyncClient) -> None:
        nonlocal heard, left
        while waiting:
            prompt, most_events = waiting.pop()
            text = await listen(client, prompt, most_events)
            if text is None:
                left += 1
            else:
                assert text == alone[prompt]
                heard += 1

    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=url, limits=limits, timeout=300) as client,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(at_once):
            group.create_task(one_after_another(client))
    return heard, left


async def each_alone(url: str) -> list[str]:
    """Return the answer to each prompt without concurrent requests."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        return [await listen(client, prompt, None) or "" for prompt in range(len(PROMPTS))]


def metric(service: Process, name: str) -> float:
    """Return a metric of the model `tiny`."""
    metrics = httpx.get(f"{service.url}/metrics").text.splitlines()
    [line] = [line for line in metrics if line.startswith(f'minimind_{name}{{model="tiny"}}')]
    return float(line.split()[-1])


ASKED = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "你好"}],
    "max_tokens": -1,
    "n": 16,
    "stream": True,
    "logit_bias": {"0": -100, "2": -100},  # never end the answer
}


def read_to_the_end(url: str, heard: list[str], begun: threading.Barrier) -> None:
    with httpx.Client(timeout=30) as client, client.stream("POST", url, json=ASKED) as answer:
        lines = answer.iter_lines()
        heard.append(next(lines))
        begun.wait()
        heard.extend(line for line in lines if line)


def stop_during_streams(models_dir: Path, log: Path, number: int) -> float:
    """Signal a service with open streams; return the seconds until it has exited."""
    with serving(models_dir, log, "--slots", "4") as service:
        streams: list[list[str]] = [[], [], []]
        begun = threading.Barrier(len(streams) + 1)
        threads = [
            threading.Thread(
                target=read_to_the_end, args=(f"{service.url}/v1/chat/completions", heard, begun)
            )
            for heard in streams
        ]
        for thread in threads:
            thread.start()
        begun.wait()
        everyone = [psutil.Process(service.child.pid)]
        everyone += everyone[0].children(recursive=True)
        began = time.monotonic()
        service.child.send_signal(number)
        status = service.child.wait(timeout=5)
        took = time.monotonic() - began
        assert status == (0 if number == signal.SIGTERM else 130)
        for thread in threads:
            thread.join(timeout=5)
            assert not thread.is_alive()
        for heard in streams:  # every client received the error
            assert heard[-1] == "data: [DONE]"
            error = json.loads(heard[-2].removeprefix("data: "))["error"]
            assert error["code"] == "stopping"
        wait_until(lambda: not any(child.is_running() for child in everyone))
    events = [json.loads(line)["event"] for line in log.read_text().splitlines() if line[:1] == "{"]
    assert events[-1] == "ended"
    return took
