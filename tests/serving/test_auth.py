import asyncio
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from openai import AuthenticationError, OpenAI
from typer.testing import CliRunner

from minimind.cli.main import app
from minimind.errors import ResourceError, UsageError
from minimind.serving import server
from minimind.serving.app import Service, create_app
from minimind.serving.auth import check_exposure, is_loopback, normalized_origin

KEY = "key-of-the-tests"


@pytest.fixture(scope="module")
def guarded(serve_here: Callable[..., Any]) -> Iterator[httpx.Client]:
    with serve_here(keys=[KEY, "another"]) as service, httpx.Client(base_url=service.url) as client:
        yield client


def test_all_routes_except_the_index_health_and_docs_require_a_key(guarded: httpx.Client) -> None:
    paths = list(guarded.get("/openapi.json").json()["paths"])
    assert set(paths) > {"/health", "/metrics", "/v1/models", "/v1/chat/completions"}
    paths += ["/nowhere", "/health/", "//health", "/HEALTH", "/docs/", "//docs", "/redoc"]
    paths += ["/docs/../v1/models", "/docs-static/../v1/models", "/openapi.json/"]
    for public in ("/", "/health"):
        paths.remove(public)
    bad = ["", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer", f"Basic {KEY}", KEY, "Bearer é"]
    url = str(guarded.base_url).rstrip("/")  # absolute: //docs would be another host
    for path in paths:
        for method in ("GET", "POST", "OPTIONS", "DELETE"):
            for key in bad:
                answer = guarded.request(
                    method, url + path, headers={"authorization": key.encode()}
                )
                assert answer.status_code == 401, (method, path, key)
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["code"] == "invalid_api_key"
    assert guarded.get("/health").json() == {"status": "ok"}
    assert "GET /v1/models" in guarded.get("/").json()["endpoints"]
    head = guarded.head("/health")
    assert (head.status_code, head.content) == (200, b"")
    for key in (KEY, "another"):
        answer = guarded.get("/v1/models", headers={"authorization": f"bearer {key}"})
        assert answer.status_code == 200


def test_docs_are_public_and_declare_bearer_authentication(guarded: httpx.Client) -> None:
    page = guarded.get("/docs")
    assert page.status_code == 200
    urls = re.findall(r"""(?:src|href|url)\s*[:=]\s*["']([^"']+)""", page.text)
    assert "/openapi.json" in urls
    for url in urls:  # everything the page loads
        assert guarded.get(url).status_code == 200, url
    described = guarded.get("/openapi.json").json()
    assert described["components"]["securitySchemes"] == {
        "HTTPBearer": {"type": "http", "scheme": "bearer"}  # the button "Authorize"
    }
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            needed = [] if path in ("/", "/health") else [{"HTTPBearer": []}]
            assert operation.get("security", []) == needed, (method, path)


def test_key_errors_have_the_types_of_openai(guarded: httpx.Client) -> None:
    with OpenAI(base_url=f"{guarded.base_url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(AuthenticationError) as caught:
            client.models.list()
        assert caught.value.type == "invalid_request_error"
        assert caught.value.code == "invalid_api_key"
        assert caught.value.param is None


@pytest.mark.parametrize("declared", [True, False])
def test_the_key_is_checked_before_the_body_is_read(
    declared: bool, serve_here: Callable[..., Any]
) -> None:
    """The response arrives after the client has sent only the headers."""
    length = "content-length: 900000" if declared else "transfer-encoding: chunked"
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
    head += f"content-type: application/json\r\n{length}\r\n\r\n"
    with (
        serve_here(keys=[KEY], body_seconds=60) as service,
        socket.create_connection(service.address, timeout=10) as connection,
    ):
        sent = connection.send(head.encode())
        status = connection.recv(12)
        assert sent == len(head)
        assert status == b"HTTP/1.1 401"


def test_without_a_key_only_loopback_addresses_are_allowed(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MINIMIND_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.com"):
        with pytest.raises(UsageError, match="requires an API key"):
            check_exposure(host, [])
        check_exposure(host, [KEY])
        done = CliRunner().invoke(app, ["serve", str(models_dir), "--host", host])
        assert done.exit_code == 1
        assert "MINIMIND_API_KEY" in done.stderr
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        check_exposure(host, [])
        assert is_loopback(host)


@pytest.mark.parametrize("key", ["", " ", " a", "a\n", "密钥"])
def test_invalid_keys_are_refused(key: str) -> None:
    with pytest.raises(UsageError, match="key"):
        check_exposure("127.0.0.1", ["good", key])


def test_dns_rebinding_is_refused(serve_here: Callable[..., Any]) -> None:
    with serve_here() as service, httpx.Client(base_url=service.url) as client:
        port = service.address[1]
        for host, status in [
            (f"127.0.0.1:{port}", 200),
            (f"localhost:{port}", 200),
            ("[::1]", 200),
            ("evil.example", 403),
            (f"127.0.0.1.evil.example:{port}", 403),
        ]:
            assert client.get("/v1/models", headers={"host": host}).status_code == status, host


def test_cross_origin_requests_are_not_allowed_by_default(process: Any, models_dir: Path) -> None:
    origin = {"origin": "https://page.example"}
    preflight = origin | {"access-control-request-method": "POST"}
    answers = [
        httpx.get(f"{process.url}/v1/models", headers=origin),
        httpx.options(f"{process.url}/v1/chat/completions", headers=preflight),
        # Browsers send text/plain without a CORS preflight, so it must not be parsed as JSON.
        httpx.post(
            f"{process.url}/v1/chat/completions",
            content=b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}]}',
            headers=origin | {"content-type": "text/plain"},
        ),
    ]
    assert [answer.status_code for answer in answers] == [200, 405, 400]
    assert "content-type: application/json" in answers[-1].json()["error"]["message"]
    assert not any("access-control-allow-origin" in answer.headers for answer in answers)


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("*", "*"),
        ("http://localhost:3000/", "http://localhost:3000"),
        ("https://Example.com:443", "https://example.com"),
        ("http://[::1]:80", "http://[::1]"),
        ("app://obsidian.md", "app://obsidian.md"),
    ],
)
def test_origins_are_those_that_browsers_send(given: str, origin: str) -> None:
    assert normalized_origin(given) == origin


@pytest.mark.parametrize("given", ["localhost:3000", "example.com", "https://a.b/c", "http://", ""])
def test_what_is_no_origin_is_refused(given: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["serve", str(tmp_path), f"--cors={given}"])
    assert done.exit_code == 1
    assert f"error: --cors {given} is not an origin" in done.output


def test_pages_of_an_allowed_origin_may_read_our_headers() -> None:
    origin = "http://localhost:3000"

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(Service({}), origins=[origin]))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/health", headers={"origin": origin})

    headers = asyncio.run(ask()).headers
    assert headers["access-control-allow-origin"] == origin
    exposed = headers["access-control-expose-headers"].split(", ")
    assert {"minimind-left-out", "retry-after", "x-request-id"} == set(exposed)


def test_a_port_that_another_service_took_during_loading() -> None:
    """On Linux, two sockets may be bound to one port as long as neither listens."""
    first = server.bind("127.0.0.1", 0)
    port = first[0].getsockname()[1]
    second = []
    try:
        with pytest.raises(ResourceError, match=f"cannot listen at 127.0.0.1, port {port}"):
            second = server.bind("127.0.0.1", port)
            server.listen(first)
            server.listen(second)
    finally:
        for bound in (*first, *second):
            bound.close()
