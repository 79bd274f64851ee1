"""Many clients that come and go: nothing is lost, and nobody's answer depends on the others."""

import asyncio
from pathlib import Path

import psutil
import pytest

from tests.support.clients import PROMPTS, churn, each_alone, figure
from tests.support.services import Process, serving, wait_until


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


def test_clients_that_come_and_go(process: Process) -> None:
    try_out(process, requests=60, at_once=24)


@pytest.mark.slow
def test_a_thousand_clients_that_come_and_go(models_dir: Path, tmp_path: Path) -> None:
    with serving(models_dir, tmp_path / "log") as service:
        try_out(service, requests=1000, at_once=64)
