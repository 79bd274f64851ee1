import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from minimind.errors import ServiceError, UsageError
from minimind.web.client import Answer, Client, ModelInfo
from tests.support.remote_services import (
    Policy,
    RemoteService,
    accepts_everything,
    like_gpt5,
    like_mistral,
    like_old,
)
from tests.support.services import serving, wait_until

ASKED = [{"role": "user", "content": "你好"}]
TINY = ModelInfo("tiny", is_ours=True)


@pytest.fixture
def client(process: Any) -> Client:
    return Client(process.url, "secret")


def test_models(client: Client, process: Any) -> None:
    found = [ModelInfo("other", is_ours=True), ModelInfo("tiny", is_ours=True)]
    assert client.models() == found
    assert Client(f"{process.url.removeprefix('http://')}/v1/", "secret").models() == found


def test_an_answer_streams(client: Client) -> None:
    with client.chat(TINY, ASKED, temperature=0, max_tokens=12) as answer:
        pieces = list(answer)
    assert len(pieces) > 3
    assert (answer.finish_reason, answer.tokens, answer.left_out) == ("length", 12, 0)
    with client.chat(TINY, ASKED, temperature=0, max_tokens=12, stop=None) as again:
        assert list(again) == pieces


def test_closing_cancels_generation_at_the_service(client: Client, process: Any) -> None:
    def running() -> float:
        key = {"authorization": "Bearer secret"}
        metrics = httpx.get(f"{process.url}/metrics", headers=key).text.splitlines()
        [line] = [line for line in metrics if line.startswith('minimind_running{model="tiny"')]
        return float(line.split()[-1])

    with client.chat(TINY, ASKED, temperature=0, max_tokens=-1) as answer:
        next(iter(answer))
    wait_until(lambda: running() == 0)


def test_another_thread_can_abort_an_answer(models_dir: Path, tmp_path: Path) -> None:
    """A queued request too: it leaves the queue."""

    def running_and_waiting() -> list[int]:
        lines = httpx.get(f"{service.url}/metrics").text.splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return [
            int(float(found[f'minimind_{name}{{model="tiny"}}'])) for name in ("running", "waiting")
        ]

    with serving(models_dir / "tiny", tmp_path / "log", "--slots", "1") as service:
        client = Client(service.url)
        ends: list[object] = []

        def read(answer: Answer) -> None:
            try:
                ends.append("".join(answer))
            except ServiceError as error:
                ends.append(error)

        answers = [
            client.chat(
                TINY, ASKED, temperature=0, max_tokens=-1, logit_bias={"0": -100, "2": -100}
            )
            for _ in range(2)
        ]
        threads = [threading.Thread(target=read, args=(answer,)) for answer in answers]
        for thread in threads:
            thread.start()
        wait_until(lambda: running_and_waiting() == [1, 1])
        for place, left in ((1, [1, 0]), (0, [0, 0])):
            answers[place].abort()
            threads[place].join(timeout=20)
            assert not threads[place].is_alive()
            wait_until(lambda left=left: running_and_waiting() == left)  # type: ignore[misc]
        assert all(isinstance(end, ServiceError) for end in ends)
        answers[0].abort()  # a second call has no effect


def test_turns_that_do_not_fit_are_left_out(client: Client) -> None:
    long = [{"role": "user", "content": "长江" * 900}] * 20
    with client.chat(TINY, [*long, *ASKED], max_tokens=3) as answer:
        assert 0 < answer.left_out <= 20


def test_refusals_of_the_service_are_reported(client: Client, process: Any) -> None:
    with pytest.raises(ServiceError, match="404: The model 'nobody' does not exist"):
        client.chat(ModelInfo("nobody", is_ours=True), ASKED)
    with pytest.raises(ServiceError, match="400: Invalid value for 'temperature'"):
        client.chat(TINY, ASKED, temperature=9)
    for key in (None, "wrong"):
        with pytest.raises(ServiceError, match="rejected the API key; set the"):
            Client(process.url, key).models()
    with pytest.raises(ServiceError, match=r"cannot be reached .* is it running"):
        Client("http://127.0.0.1:9").models()


def test_the_url_may_have_another_version_path() -> None:
    assert Client("https://open.bigmodel.cn/api/paas/v4").url.endswith("/api/paas/v4")
    with pytest.raises(UsageError, match="is not the URL of a service"):
        Client("ftp://a")


def answer_to(client: Client, **settings: Any) -> str:
    """Return the answer of a foreign service, and check that it is complete."""
    with client.chat(ModelInfo("m", is_ours=False), ASKED, **settings) as answer:
        text = "".join(answer)
    assert answer.finish_reason
    return text


@pytest.mark.parametrize(
    ("policy", "sent", "requests"),
    [
        (accepts_everything, {"max_tokens", "stream_options"}, 1),
        (like_old, {"max_tokens", "stream_options"}, 1),
        (like_gpt5, {"max_completion_tokens", "stream_options"}, 2),
        (like_mistral, {"max_tokens"}, 2),
    ],
)
def test_the_token_limit_has_the_name_that_the_service_accepts(
    policy: Policy, sent: set[str], requests: int
) -> None:
    with RemoteService(lambda messages: "I am fine.", "m", policy) as server:
        client = Client(server.url)
        assert answer_to(client, max_tokens=2, seed=None) == "I am"
        assert len(server.requests) == requests
        assert answer_to(client, max_tokens=2) == "I am"
        assert len(server.requests) == requests + 1  # the rejection is remembered
        assert set(server.requests[-1]) == {"model", "messages", "stream", *sent}


def test_other_rejected_parameters_are_reported() -> None:
    def too_large(body: dict[str, Any]) -> tuple[int, object] | None:
        return 400, {"error": {"message": "max_tokens is too large: at most 4096"}}

    with RemoteService(lambda messages: "", "m", too_large) as server:
        with pytest.raises(ServiceError, match="answered 400: max_tokens is too large"):
            answer_to(Client(server.url), max_tokens=9999)
        assert len(server.requests) == 1
    with (
        RemoteService(lambda messages: "", "m", like_gpt5) as server,
        pytest.raises(ServiceError, match="'temperature' does not support"),
    ):
        answer_to(Client(server.url), max_tokens=9, temperature=0.5)


@pytest.fixture
def other_service() -> Iterator[Callable[[int, bytes], Client]]:
    """Start a foreign service that gives the same answer to every request."""
    servers = []

    def start(status: int, body: bytes, **headers: str) -> Client:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("content-length") or 0))
                heard.append(dict(self.headers))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        heard: list[dict[str, str]] = []
        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        servers.append(server)
        client = Client(f"http://127.0.0.1:{server.server_port}", "secret")
        client.heard = heard  # type: ignore[attr-defined]
        return client

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


THEIRS = ModelInfo("gpt", is_ours=False)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "closed before the end"),
        (b'data: {"choices": []}\n\n', "closed before the end"),
        (b"data: {\n\n", "not JSON"),
        (b'data: {"error": {"message": "too hot"}}\n\n', "too hot"),
        (b'data: {"choices": [{"text": "a"}]}\n\n', "does not stream in OpenAI's format"),
        (b'data: {"choices": 5}\n\n', "does not stream in OpenAI's format"),
    ],
)
def test_a_service_that_violates_the_protocol(other_service: Any, body: bytes, said: str) -> None:
    with pytest.raises(ServiceError, match=said):
        list(other_service(200, body).chat(THEIRS, ASKED))
    with pytest.raises(ServiceError, match="does not follow OpenAI's API"):
        other_service(200, body).models()


def test_comments_and_other_fields_are_ignored(other_service: Any) -> None:
    events = [{"choices": [{"delta": {"content": text}}]} for text in ("a", "b")]
    lines = "".join(f": wait\nevent: x\ndata: {json.dumps(event)}\n\n" for event in events)
    client = other_service(200, (lines + "data: [DONE]\n\n").encode())
    assert "".join(client.chat(THEIRS, ASKED)) == "ab"


def test_redirects_do_not_leak_the_key(other_service: Any) -> None:
    elsewhere = other_service(200, b'{"data": []}')
    client = other_service(302, b"", location=f"{elsewhere.url}/models")
    with pytest.raises(ServiceError, match="answered 302"):
        client.models()
    assert client.heard
    assert not elsewhere.heard
