"""Shutdown during requests."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest

from tests.support.clients import ENDLESS_BODY, stop_during_streams
from tests.support.commands import fast_python
from tests.support.services import wait_until


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_shutdown_during_streams(models_dir: Path, tmp_path: Path, number: int) -> None:
    stop_during_streams(models_dir, tmp_path / "log", number)


@pytest.mark.slow
def test_fifty_shutdowns(models_dir: Path, tmp_path: Path) -> None:
    for times in range(50):
        number = signal.SIGTERM if times % 2 else signal.SIGINT
        stop_during_streams(models_dir, tmp_path / "log", number)


def test_answers_within_the_grace_period_are_finished(serve_here: Callable[..., Any]) -> None:
    body = ENDLESS_BODY | {"n": 1, "max_tokens": 600}
    with (
        serve_here(grace_seconds=600.0) as service,
        httpx.Client(base_url=service.url, timeout=600) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        service.server.should_exit = True  # as after SIGTERM
        wait_until(lambda: service.server._service.is_stopping)
        assert service.server._service._in_progress, "the answer was finished before the shutdown"
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"


def test_service_ends_with_its_parent_process(models_dir: Path, tmp_path: Path) -> None:
    starter = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-m', 'minimind', 'serve', {str(models_dir)!r},"
        " '--port', '0', '--exit-with-stdin'], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "print(child.pid, child.stdout.readline().decode(), flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", starter],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    with parent:
        assert parent.stdout
        child = psutil.Process(int(parent.stdout.readline().split()[0]))
        parent.kill()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 10)


def test_a_port_in_use_is_reported(process: Any, models_dir: Path) -> None:
    port = process.url.rpartition(":")[2]
    done = subprocess.run(
        [*fast_python(), "-m", "minimind", "serve", models_dir, "--port", port],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "error: cannot listen at 127.0.0.1" in done.stderr
    assert "Choose another --port" in done.stderr


@pytest.fixture(autouse=True)
def _sigint_is_not_ignored() -> Iterator[None]:
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    yield
