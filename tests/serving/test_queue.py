"""Admission control, fairness, and clients that disconnect."""

import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest

from minimind.serving.admission import AdmissionQueue
from minimind.serving.errors import APIError
from tests.support.services import wait_until

CHAT = "/v1/chat/completions"
HEADERS = {"content-type": "application/json"}


def chat_body(**settings: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "你好"}]
    return {"model": "tiny", "messages": messages, "temperature": 0} | settings


def stats(service: Any) -> Any:
    return service.models["tiny"].engine.stats()


def is_idle(service: Any) -> bool:
    return stats(service).running == stats(service).waiting == 0


def test_the_admission_queue_refuses_what_exceeds_its_size() -> None:
    queue = AdmissionQueue(slots=2, max_queued=3)
    queue.admit(2)
    assert queue.queued == 0
    queue.admit(3)
    assert queue.queued == 3
    with pytest.raises(APIError) as caught:
        queue.admit(1)
    assert caught.value.status == 429
    assert caught.value.headers == {"retry-after": "2"}  # 1 s per answer, 2 slots, 4 in line
    for _ in range(200):
        queue.release(30.0)
        queue.admit(1)
    with pytest.raises(APIError) as caught:
        queue.admit(1)
    assert caught.value.headers == {"retry-after": "60"}
    with pytest.raises(APIError) as caught:
        queue.admit(6)
    assert caught.value.status == 400  # can never fit
    for _ in range(5):
        queue.release(0.1)
    queue.admit(5)


def test_a_full_queue_returns_429_with_retry_after(serve_here: Callable[..., Any]) -> None:
    with serve_here(slots=1, queue=2) as service:
        url = f"{service.url}{CHAT}"
        with (
            httpx.Client() as client,
            client.stream("POST", url, json=chat_body(stream=True, max_tokens=-1, n=3)) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            refused = httpx.post(url, json=chat_body())
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert refused.json()["error"]["code"] == "queue_full"
            too_many = httpx.post(url, json=chat_body(n=4))
            assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "n")
        wait_until(lambda: is_idle(service))
        wait_until(lambda: service.models["tiny"].queue._admitted == 0)
        assert httpx.post(url, json=chat_body(max_tokens=2)).status_code == 200


def test_requests_are_served_in_order(serve_here: Callable[..., Any]) -> None:
    """Under load, a request waits only for those that came before it."""
    with serve_here(slots=1, queue=64) as service:
        url = f"{service.url}{CHAT}"
        ended: list[str] = []
        stop = threading.Event()

        def ask(name: str, tokens: int) -> None:
            answer = httpx.post(url, json=chat_body(max_tokens=tokens), timeout=60)
            assert answer.status_code == 200
            ended.append(name)

        def keep_asking() -> None:
            while not stop.is_set():
                ask("load", 10)

        with ThreadPoolExecutor(9) as pool:
            clients = [pool.submit(keep_asking) for _ in range(8)]
            wait_until(lambda: len(ended) > 20)
            before = len(ended)
            pool.submit(ask, "single", 10).result()
            assert len(ended[before:]) <= 3 * 8
            stop.set()
            for client in clients:
                client.result()
        wait_until(lambda: is_idle(service))


@pytest.mark.parametrize("streams", [True, False])
def test_a_disconnect_frees_the_slots(serve_here: Callable[..., Any], streams: bool) -> None:
    with serve_here(slots=4) as service:
        body = json.dumps(chat_body(stream=streams, max_tokens=-1, n=4)).encode()
        with socket.create_connection(service.address) as connection:
            connection.sendall(
                f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\n\r\n".encode()
                + body
            )
            wait_until(lambda: stats(service).running > 0)
        wait_until(lambda: is_idle(service))
        answer = httpx.post(f"{service.url}{CHAT}", json=chat_body(max_tokens=3))
        assert answer.status_code == 200
        metrics = httpx.get(f"{service.url}/metrics").text
        num_tokens = next(
            float(line.split()[-1])
            for line in metrics.splitlines()
            if line.startswith("minimind_completion_tokens_total")
        )
        assert num_tokens < 4 * 2000  # generation was cancelled
        assert 'route="/v1/chat/completions",status="499"' in metrics or streams
