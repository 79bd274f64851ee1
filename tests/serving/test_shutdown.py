"""The end of a service in the middle of its work."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from services import serving, wait_until

ASKED = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "你好"}],
    "max_tokens": -1,
    "n": 16,
    "stream": True,
    "logit_bias": {"0": -100, "2": -100},  # the ends of texts and messages: it goes on and on
}


def read_to_the_end(url: str, heard: list[str], begun: threading.Barrier) -> None:
    with httpx.Client(timeout=30) as client, client.stream("POST", url, json=ASKED) as answer:
        lines = answer.iter_lines()
        heard.append(next(lines))
        begun.wait()
        heard.extend(line for line in lines if line)


def stop_in_the_middle(models_dir: Path, log: Path, number: int) -> float:
    """Seconds from the signal to the end of the process."""
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
        for heard in streams:  # each was told, and none was left hanging
            assert heard[-1] == "data: [DONE]"
            error = json.loads(heard[-2].removeprefix("data: "))["error"]
            assert error["code"] == "stopping"
        wait_until(lambda: not any(child.is_running() for child in everyone))
    events = [json.loads(line)["event"] for line in log.read_text().splitlines() if line[:1] == "{"]
    assert events[-1] == "ended"
    return took


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_it_ends_in_the_middle_of_streams(models_dir: Path, tmp_path: Path, number: int) -> None:
    stop_in_the_middle(models_dir, tmp_path / "log", number)


@pytest.mark.slow
def test_it_ends_fifty_times(models_dir: Path, tmp_path: Path) -> None:
    for times in range(50):
        number = signal.SIGTERM if times % 2 else signal.SIGINT
        stop_in_the_middle(models_dir, tmp_path / "log", number)


def test_what_is_nearly_done_is_finished(models_dir: Path, tmp_path: Path) -> None:
    with serving(models_dir, tmp_path / "log") as service:
        url = f"{service.url}/v1/chat/completions"
        body = ASKED | {"n": 1, "max_tokens": 300}
        with httpx.Client(timeout=30) as client, client.stream("POST", url, json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            service.child.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] in ("length", "stop")
        assert service.child.wait(timeout=5) == 0


def test_it_ends_with_the_one_that_started_it(models_dir: Path, tmp_path: Path) -> None:
    starter = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-m', 'minimind', 'serve', {str(models_dir)!r},"
        " '--port', '0', '--end-with-stdin'], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
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


def test_a_port_that_is_taken_is_told(process: Any, models_dir: Path) -> None:
    port = process.url.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "minimind", "serve", models_dir, "--port", port],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "error: cannot listen at 127.0.0.1" in done.stderr
    assert "Give another --port" in done.stderr


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    yield
