"""A service whose engine has stopped after a device error."""

import contextlib
import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from minimind.errors import ResourceError
from minimind.serving.server import bind, url_of
from tests.support.commands import fast_python
from tests.support.services import InProcess, wait_until

DEVICE_ERROR = "CUDA error: an illegal memory access was encountered\nMore lines."
ASKED = {"model": "tiny", "prompt": "长江", "max_tokens": 2000, "temperature": 0}


def break_device(service: InProcess) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError(DEVICE_ERROR)

    [model] = service.models.values()
    model.engine._graphed_model.forward = fail  # type: ignore[method-assign]
    model.engine.model.cache.clear = fail  # type: ignore[method-assign]


def test_all_requests_fail_and_health_gives_the_reason(
    serve_here: Callable[..., InProcess],
) -> None:
    with serve_here(slots=1) as service, httpx.Client(base_url=service.url, timeout=30) as client:
        answers: list[httpx.Response] = []
        waiting = [
            threading.Thread(
                target=lambda: answers.append(
                    httpx.post(f"{service.url}/v1/completions", json=ASKED, timeout=30)
                )
            )
            for _ in range(2)
        ]
        with client.stream("POST", "/v1/completions", json=ASKED | {"stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            for thread in waiting:
                thread.start()
            [model] = service.models.values()
            wait_until(lambda: model.engine.stats().waiting == 2)
            assert client.get("/health").json() == {"status": "ok"}
            break_device(service)
            last = [line for line in lines if line and "[DONE]" not in line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "generation_failed"
        for thread in waiting:
            thread.join(20)
        assert [answer.status_code for answer in answers] == [500, 500]
        reason = (
            "the engine of tiny stopped: RuntimeError: "
            "CUDA error: an illegal memory access was encountered"
        )
        health = client.get("/health")
        assert health.status_code == 503
        assert health.json() == {"status": "failed", "reason": reason}
        for route, body in (
            ("completions", ASKED),
            ("chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}),
        ):
            refused = client.post(f"/v1/{route}", json=body)
            assert refused.status_code == 503
            error = refused.json()["error"]
            assert error["code"] == "engine_failed"
            assert error["message"] == (f"The service has failed and must be restarted: {reason}.")
        assert model.queue.queued == 0


def test_the_server_exits(serve_here: Callable[..., InProcess]) -> None:
    with serve_here(failed_seconds=0) as service:
        break_device(service)
        answer = httpx.post(f"{service.url}/v1/completions", json=ASKED, timeout=30)
        assert answer.status_code == 500
        service._thread.join(timeout=20)
        assert not service._thread.is_alive()


_BROKEN_SERVICE = """
import functools, sys
from minimind.inference import graphs

forward = graphs.GraphedModel.forward
steps = 0

def fail_after_some_steps(*arguments):
    global steps
    steps += 1
    if steps > 20:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return forward(*arguments)

graphs.GraphedModel.forward = fail_after_some_steps
from minimind.serving import limits

limits.Limits = functools.partial(limits.Limits, failed_seconds=2)
from minimind.cli.main import main
sys.argv = ["minimind", "serve", sys.argv[1], "--port", "0"]
main()
"""


def test_the_process_exits_with_status_1(models_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [*fast_python(), "-c", _BROKEN_SERVICE, str(models_dir / "tiny")],
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        ) as child,
    ):
        try:
            assert child.stdout
            url = child.stdout.readline().split()[-1]

            def is_up() -> bool:
                with contextlib.suppress(httpx.TransportError):
                    return httpx.get(f"{url}/models").status_code == 200
                return False

            wait_until(is_up)
            assert httpx.post(f"{url}/completions", json=ASKED, timeout=30).status_code == 500
            assert httpx.get(f"{url.removesuffix('/v1')}/health").status_code == 503
            assert child.wait(timeout=30) == 1
        finally:
            child.kill()
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    [failed] = [line for line in lines if line["event"] == "failed"]
    assert failed["level"] == "error"
    assert failed["reason"].startswith("the engine of tiny stopped: RuntimeError: CUDA error")
    assert [line["event"] for line in lines][-2:] == ["stopping", "ended"]


def addresses_of(sockets: list[socket.socket]) -> list[str]:
    return [bound.getsockname()[0] for bound in sockets]


def entries(*addresses: str) -> list[Any]:
    """Return `getaddrinfo` entries of these addresses, duplicated as on some systems."""
    single = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, 0, 0, 0))
        if ":" in address
        else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))
        for address in addresses
    ]
    return single * 2


def test_all_addresses_of_a_host_are_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    # No machine has 192.0.2.1 (RFC 5737). Without IPv6 none has ::1.
    names = entries("::1", "192.0.2.1", "127.0.0.1")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: names)
    sockets = bind("localhost", 0)
    try:
        assert addresses_of(sockets) == ["127.0.0.1", "::1"]
        [port] = {bound.getsockname()[1] for bound in sockets}
        assert url_of(sockets) == f"http://127.0.0.1:{port}"
        sockets[0].listen()
        with pytest.raises(ResourceError, match="cannot listen at localhost"):
            bind("localhost", port)
    finally:
        for bound in sockets:
            bound.close()


def test_a_socket_that_cannot_be_bound_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    sockets: list[socket.socket] = []
    real = socket.socket

    class Recorded(real):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            sockets.append(self)

    with real() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(socket, "socket", Recorded)
        for host in ("127.0.0.1", "192.0.2.1"):
            with pytest.raises(ResourceError, match=f"cannot listen at {host}, port {port}"):
                bind(host, port)
    assert len(sockets) == 2
    assert [closed.fileno() for closed in sockets] == [-1, -1]
