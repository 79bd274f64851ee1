"""Clients that send too much, too slowly, or invalid HTTP."""

import contextlib
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from pydantic import ValidationError

from minimind.serving.requests import ChatRequest, CompletionRequest
from tests.support.services import Process

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "你好"}]}


@pytest.fixture(scope="module")
def quick(serve_here: Callable[..., Any]) -> Iterator[Any]:
    """A service with short timeouts."""
    with serve_here(
        body_bytes=10_000, header_seconds=0.5, body_seconds=0.5, write_seconds=0.5
    ) as service:
        yield service


def connect(service: Any) -> socket.socket:
    return socket.create_connection(service.address, timeout=20)


def answer_of(connection: socket.socket) -> tuple[int, Any]:
    """Return status and body after the service has closed the connection."""
    data = b""
    while received := connection.recv(65536):
        data += received
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)


def is_healthy(service: Any) -> bool:
    return httpx.get(f"{service.url}/health").status_code == 200


def test_content_length_beyond_the_limit_is_refused(quick: Any) -> None:
    with connect(quick) as connection:
        # The body is never sent: the header is enough to refuse the request.
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10001\r\n\r\n".encode()
        )
        status, body = answer_of(connection)
    assert (status, body["error"]["code"]) == (413, "request_too_large")
    assert "10,000 bytes" in body["error"]["message"]


def test_a_chunked_body_beyond_the_limit_is_refused(quick: Any) -> None:
    with connect(quick) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n"
            "content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n".encode()
        )
        for _ in range(11):
            connection.sendall(b"3e8\r\n" + b" " * 1000 + b"\r\n")
        status, body = answer_of(connection)  # before the last chunk
    assert (status, body["error"]["code"]) == (413, "request_too_large")


def test_a_client_that_keeps_sending_receives_the_error(quick: Any) -> None:
    answer = httpx.post(f"{quick.url}{CHAT}", content=b" " * 5_000_000)
    assert answer.status_code == 413


def test_a_body_of_maximum_size_is_accepted(quick: Any) -> None:
    body = json.dumps(BODY | {"max_tokens": 2}).encode()
    headers = {"content-type": "application/json"}
    url = f"{quick.url}{CHAT}"
    assert httpx.post(url, content=body.ljust(10_000), headers=headers).status_code == 200
    assert httpx.post(url, content=body.ljust(10_001), headers=headers).status_code == 413


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-slow: ",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{",
    ],
    ids=["nothing", "half of the headers", "part of the body"],
)
def test_a_slow_client_times_out(quick: Any, sent: bytes) -> None:
    with connect(quick) as connection:
        connection.sendall(sent)
        assert is_healthy(quick)
        status, body = answer_of(connection)
    assert (status, body["error"]["code"]) == (408, "request_timeout")
    assert set(body["error"]) == {"message", "type", "param", "code"}


def test_a_trickle_of_headers_does_not_extend_the_timeout(quick: Any) -> None:
    began = time.monotonic()
    with connect(quick) as connection, pytest.raises(OSError):
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        while time.monotonic() < began + 20:
            time.sleep(0.1)
            connection.sendall(b"x: y\r\n")
    assert time.monotonic() < began + 20


def test_bytes_beyond_content_length_are_not_part_of_the_body(quick: Any) -> None:
    with connect(quick) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            'content-length: 2\r\n\r\n{}{"model": "tiny"}\r\n\r\n'.encode()
        )
        data = b""
        while received := connection.recv(65536):
            data += received
    assert data.startswith(b"HTTP/1.1 400")
    assert data.count(b"HTTP/1.1") == data.count(b"HTTP/1.1 400") == 2


@pytest.mark.parametrize(
    "head",
    [
        *(f"content-length: {length}" for length in ["-1", "1e3", "0x10", "5, 6", "９"]),
        "content-length: 5\r\ncontent-length: 6",
        "transfer-encoding: gzip, chunked",
        "no colon",
        "bad\0name: x",
        "x: " + "y" * 200_000,
    ],
)
def test_invalid_headers_are_refused(quick: Any, head: str) -> None:
    with connect(quick) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n{head}\r\n\r\n".encode())
        status, body = answer_of(connection)
    assert status in (400, 501)
    assert body["error"]["code"] == "invalid_http"
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert is_healthy(quick)


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"hello\r\n\r\n", b"GET / HTTP/9"]
)
def test_other_protocols_are_refused(quick: Any, sent: bytes) -> None:
    with connect(quick) as connection:
        connection.sendall(sent + b"\r\n\r\n")
        status, body = answer_of(connection)
    assert (status, body["error"]["code"]) == (400, "invalid_http")


def test_two_body_lengths_are_refused(quick: Any) -> None:
    with connect(quick) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\n"
            "transfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\n\r\n".encode()
        )
        status, body = answer_of(connection)
    assert (status, body["error"]["code"]) == (400, "invalid_http")


def test_an_invalid_chunk_is_refused(quick: Any) -> None:
    with connect(quick) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
            "5\r\nhello\r\n".encode()
        )
        time.sleep(0.1)
        connection.sendall(b"what is this\r\n")
        status, body = answer_of(connection)
    assert (status, body["error"]["code"]) == (400, "invalid_http")
    assert is_healthy(quick)


def test_deep_nesting_is_refused(quick: Any) -> None:
    for body in (b"[" * 9_000, b'{"a":' * 1_800, b'{"model": ' + b"[" * 4000 + b"]" * 4000 + b"}"):
        answer = httpx.post(
            f"{quick.url}{CHAT}", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "invalid_json"
        assert "recursion" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "invalid",
    [
        {"messages": [{"role": "user", "content": [1] * 100_000}]},
        {"messages": [{f"k{i}": i for i in range(40)}] * 2000},
        {"messages": [{f"k{i}": i for i in range(60_000)}]},
        {"logit_bias": {str(i): "x" for i in range(60_000)}},
        {"stop": [1] * 100_000},
        {f"k{i}": i for i in range(60_000)},
        {"prompt": ["a", 1] * 50_000},
        {"prompt": [["a"] * 10_000] * 10},
    ],
    ids=lambda invalid: next(iter(invalid)),
)
def test_many_invalid_values_give_few_errors(process: Any, invalid: dict[str, Any]) -> None:
    """Each validation error costs time that blocks the event loop."""
    kind = CompletionRequest if "prompt" in invalid else ChatRequest
    with pytest.raises(ValidationError) as error:
        kind.model_validate(BODY | invalid)
    assert error.value.error_count() <= 50
    path = "/v1/completions" if "prompt" in invalid else CHAT
    answer = httpx.post(f"{process.url}{path}", json=BODY | invalid)
    assert answer.status_code == 400
    if len(invalid) > 1:
        message = "Invalid value for 'body': it has more than 256 keys."
        assert answer.json()["error"]["message"] == message


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"[]", b'"a"', b"\xff", b'{"n": NaN}', b"1"])
def test_bodies_that_are_not_json_objects_are_refused(quick: Any, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{quick.url}{CHAT}", content=body, headers=headers)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_client_that_does_not_read_is_disconnected(serve_here: Callable[..., Any]) -> None:
    with serve_here(slots=16, write_seconds=0.5) as service:
        body = json.dumps(
            BODY | {"stream": True, "max_tokens": -1, "n": 16, "logprobs": True, "top_logprobs": 20}
        ).encode()
        with connect(service) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(
                f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\n\r\n".encode()
                + body
            )
            wait = service.server.server_state
            end = time.monotonic() + 60
            while wait.total_requests == 0 and wait.connections and time.monotonic() < end:
                time.sleep(0.05)
            while wait.connections and time.monotonic() < end:
                time.sleep(0.05)
            assert not wait.connections
        assert is_healthy(service)


def test_connections_are_bounded(serve_here: Callable[..., Any]) -> None:
    with serve_here(connections=3) as service:
        connections = [connect(service) for _ in range(3)]
        with connect(service) as refused, contextlib.suppress(ConnectionResetError):
            assert refused.recv(1) == b""
        for connection in connections:
            connection.close()
        end = time.monotonic() + 20
        while service.server.server_state.connections and time.monotonic() < end:
            time.sleep(0.01)
        assert is_healthy(service)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no niceness")
def test_decoding_has_a_lower_priority_than_the_event_loop(process: Process) -> None:
    """Decoding threads are nicer than the main thread, which runs the event loop."""
    answer = httpx.post(f"{process.url}/v1/completions", json={"model": "tiny", "prompt": "长江"})
    assert answer.status_code == 200
    pid = process.pid
    tasks = Path(f"/proc/{pid}/task")
    nice = {int(task.name): nice_of(task / "stat") for task in tasks.iterdir()}
    assert nice.pop(pid) < max(nice.values())


def nice_of(stat: Path) -> int:
    """Return the nice value, field 19; field 2, a name in parentheses, may contain spaces."""
    return int(stat.read_text().rpartition(")")[2].split()[16])
