"""Many clients that disconnect: no leaks, and answers do not depend on other requests."""

import asyncio
from pathlib import Path

import psutil
import pytest

from tests.support.clients import PROMPTS, churn, each_alone, metric
from tests.support.services import Process, serving, wait_until


def check_churn(service: Process, requests: int, at_once: int) -> None:
    alone = asyncio.run(each_alone(service.url))
    assert len(set(alone)) == len(PROMPTS)
    # Warm up: kernel caches grow until every shape has occurred.
    asyncio.run(churn(service.url, requests, at_once, alone))
    process = psutil.Process(service.child.pid)
    before = process.memory_info().rss
    heard, left = asyncio.run(churn(service.url, requests, at_once, alone))
    assert heard + left == requests
    assert min(heard, left) > requests / 4
    wait_until(lambda: metric(service, "running") == metric(service, "waiting") == 0)
    assert process.memory_info().rss - before < 64 * 2**20
    assert asyncio.run(each_alone(service.url)) == alone


def test_disconnecting_clients(process: Process) -> None:
    check_churn(process, requests=60, at_once=24)


@pytest.mark.slow
def test_a_thousand_disconnecting_clients(models_dir: Path, tmp_path: Path) -> None:
    with serving(models_dir, tmp_path / "log") as service:
        check_churn(service, requests=1000, at_once=64)
