"""Many clients that come and go: nothing is lost, and nobody's answer depends on the others."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from services import Process, serving, wait_until

PROMPTS = ["你好", "长江有多长？", "Why is the sea salty?", "一年有几个季节？", "1949"]
TOKENS = 40


def asked(prompt: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": PROMPTS[prompt]}]
    settings = {"temperature": 0, "max_tokens": TOKENS, "stream": True}
    return {"model": "tiny", "messages": messages} | settings


async def listen(client: httpx.AsyncClient, prompt: int, most_events: int | None) -> str | None:
    """The whole answer; None where it was left in the middle."""
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
    """How many answers were heard to their end, and how many were left."""
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
    """The answer to each prompt while nothing else is asked."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        return [await listen(client, prompt, None) or "" for prompt in range(len(PROMPTS))]


def try_out(service: Process, requests: int, at_once: int) -> None:
    alone = asyncio.run(each_alone(service.url))
    assert len(set(alone)) == len(PROMPTS)
    # The same once before: caches of kernels for each shape grow until all shapes have come.
    asyncio.run(churn(service.url, requests, at_once, alone))
    process = psutil.Process(service.child.pid)
    before = process.memory_info().rss
    heard, left = asyncio.run(churn(service.url, requests, at_once, alone))
    assert heard + left == requests
    assert min(heard, left) > requests / 4
    wait_until(lambda: figure(service, "running") == figure(service, "waiting") == 0)
    assert process.memory_info().rss - before < 64 * 2**20
    assert asyncio.run(each_alone(service.url)) == alone


def figure(service: Process, name: str) -> float:
    """One of /metrics."""
    figures = httpx.get(f"{service.url}/metrics").text.splitlines()
    [line] = [line for line in figures if line.startswith(f'minimind_{name}{{model="tiny"}}')]
    return float(line.split()[-1])


def test_clients_that_come_and_go(process: Process) -> None:
    try_out(process, requests=60, at_once=24)


@pytest.mark.slow
def test_a_thousand_clients_that_come_and_go(models_dir: Path, tmp_path: Path) -> None:
    with serving(models_dir, tmp_path / "log") as service:
        try_out(service, requests=1000, at_once=64)
