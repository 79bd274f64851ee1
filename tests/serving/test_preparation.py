"""Requests that take long to prepare delay neither other requests nor the shutdown."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest

from minimind.inference import grammar
from tests.support.services import wait_until

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 2}


def body_with_schema(number: int) -> dict[str, Any]:
    """Return a request whose schema no other number has."""
    described = {"name": "answer", "schema": {"const": number}}
    return BODY | {"response_format": {"type": "json_schema", "json_schema": described}}


class SlowChecks:
    """Checks of schemas that take until `proceed` is set. started: the number of checks so far."""

    def __init__(self) -> None:
        self.started = 0
        self.proceed = threading.Event()

    def __call__(self, text: str) -> str:
        self.started += 1
        assert self.proceed.wait(120)
        return ""


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowChecks]:
    slow = SlowChecks()
    monkeypatch.setattr(grammar, "_unsupported_reason", slow)
    yield slow
    slow.proceed.set()


def test_schemas_do_not_delay_other_requests(
    serve_here: Callable[..., Any], checks: SlowChecks
) -> None:
    with serve_here(slots=4, queue=8) as service, ThreadPoolExecutor(12) as clients:

        def ask(number: int) -> httpx.Response:
            return httpx.post(f"{service.url}{CHAT}", json=body_with_schema(number), timeout=120)

        asked = [clients.submit(ask, number) for number in range(12)]
        preparation = service.server._service.preparation
        wait_until(lambda: preparation._num_schemas["tiny"] == 12)
        wait_until(lambda: checks.started == 2)
        assert httpx.post(f"{service.url}{CHAT}", json=BODY).status_code == 200
        any_object = BODY | {"response_format": {"type": "json_object"}}
        assert httpx.post(f"{service.url}{CHAT}", json=any_object).status_code == 200
        refused = ask(12)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "10"
        assert refused.json()["error"]["code"] == "queue_full"
        assert checks.started == 2
        checks.proceed.set()
        assert {done.result().status_code for done in asked} == {200}
        assert ask(13).status_code == 200


def test_a_schema_is_not_checked_after_its_client_has_left(
    serve_here: Callable[..., Any], checks: SlowChecks
) -> None:
    with serve_here() as service:
        preparation = service.server._service.preparation
        for number in range(9):
            body = json.dumps(body_with_schema(number)).encode()
            with socket.create_connection(service.address) as connection:
                connection.sendall(
                    f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                    f"content-length: {len(body)}\r\n\r\n".encode()
                    + body
                )
                wait_until(lambda: preparation._num_schemas["tiny"] == 1)
            wait_until(lambda: preparation._num_schemas["tiny"] == 0)
        checks.proceed.set()
        answer = httpx.post(f"{service.url}{CHAT}", json=body_with_schema(9))
        assert answer.status_code == 200
    assert checks.started == 3  # of two clients that left while it ran, and of the last one


def test_shutdown_does_not_wait_for_preparation(
    serve_here: Callable[..., Any], checks: SlowChecks
) -> None:
    with serve_here(grace_seconds=0.1) as service, ThreadPoolExecutor(3) as clients:
        asked = [
            clients.submit(
                httpx.post, f"{service.url}{CHAT}", json=body_with_schema(number), timeout=120
            )
            for number in range(3)
        ]
        preparation = service.server._service.preparation
        wait_until(lambda: preparation._num_schemas["tiny"] == 3 and checks.started == 2)
        service.server.should_exit = True  # as after SIGTERM
        answers = [done.result() for done in asked]
        service._thread.join(timeout=120)
        assert not service._thread.is_alive()
        assert not checks.proceed.is_set()
    assert [answer.status_code for answer in answers] == [503] * 3
    assert {answer.json()["error"]["code"] for answer in answers} == {"stopping"}
    assert checks.started == 2  # the third was never begun
