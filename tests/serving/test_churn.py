"""Many clients that disconnect: no leaks, and answers do not depend on other requests."""

import asyncio
from pathlib import Path

import psutil
import pytest

from tests.support.clients import PROMPTS, answers_alone, churn, metric
from tests.support.services import Process, serving, wait_until


def check_churn(service: Process, requests: int, concurrency: int) -> None:
    expected = asyncio.run(answers_alone(service.url))
    assert len(set(expected)) == len(PROMPTS)
    # Warm up: kernel caches grow until every shape has occurred.
    asyncio.run(churn(service.url, requests, concurrency, expected))
    process = psutil.Process(service.pid)
    before = process.memory_info().rss
    completed, abandoned = asyncio.run(churn(service.url, requests, concurrency, expected))
    assert completed + abandoned == requests
    assert min(completed, abandoned) > requests / 4
    wait_until(lambda: metric(service, "running") == metric(service, "waiting") == 0)
    assert process.memory_info().rss - before < 64 * 2**20
    assert asyncio.run(answers_alone(service.url)) == expected


def test_disconnecting_clients(process: Process) -> None:
    check_churn(process, requests=60, concurrency=24)


@pytest.mark.slow
def test_a_thousand_disconnecting_clients(models_dir: Path, tmp_path: Path) -> None:
    with serving(models_dir, tmp_path / "log") as service:
        check_churn(service, requests=1000, concurrency=64)
