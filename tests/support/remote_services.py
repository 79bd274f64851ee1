"""A local HTTP server that behaves like various OpenAI-compatible services."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[list[dict[str, str]]], str]
Refusal = tuple[int, Any]  # status, body
Policy = Callable[[dict[str, Any]], Refusal | None]

_USAGE = {"prompt_tokens": 1, "total_tokens": 3}


def _openai_error(message: str, param: str, code: str) -> Refusal:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return 400, {"error": error}


def like_gpt5(body: dict[str, Any]) -> Refusal | None:
    """OpenAI's reasoning models: a new name of the token limit, only temperature 1."""
    if "max_tokens" in body:
        return _openai_error(
            "Unsupported parameter: 'max_tokens' is not supported with this model. "
            "Use 'max_completion_tokens' instead.",
            "max_tokens",
            "unsupported_parameter",
        )
    for name in ("temperature", "top_p"):
        if body.get(name, 1) != 1:
            return _openai_error(
                f"Unsupported value: '{name}' does not support {body[name]} with this model. "
                "Only the default (1) value is supported.",
                name,
                "unsupported_value",
            )
    return None


def like_mistral(body: dict[str, Any]) -> Refusal | None:
    """Mistral: status 422 that lists every unknown field."""
    known = {"model", "messages", "stream", "temperature", "top_p", "max_tokens", "random_seed"}
    errors = [
        {"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted"}
        for name in body
        if name not in known
    ]
    return (422, {"object": "error", "message": {"detail": errors}}) if errors else None


def like_old(body: dict[str, Any]) -> Refusal | None:
    """An old service that ignores unknown fields, such as max_completion_tokens."""
    return None


def like_vllm(body: dict[str, Any]) -> Refusal | None:
    """vLLM: a question that is too long is an error that names the token limit."""
    if len(body["messages"][-1]["content"]) < 100:
        return None
    name = "max_tokens" if "max_tokens" in body else "max_completion_tokens"
    return _openai_error(
        f"'max_tokens' or 'max_completion_tokens' is too large: {body[name]}. This model's maximum "
        "context length is 100 tokens and your request has 100 input tokens.",
        name,
        "BadRequestError",
    )


def accepts_everything(body: dict[str, Any]) -> Refusal | None:
    return None


class RemoteService:
    """An HTTP server, as a context manager.

    faults: the faults of the first requests, one each: a status with Retry-After ("429", "503"),
    "hang" before the headers, "stall" or "cut" in the middle of the stream, "html", "error" as an
    event.
    requests, keys: the bodies and API keys of all requests.
    """

    def __init__(
        self, answer: Answer, name: str = "judge", policy: Policy = accepts_everything, *faults: str
    ) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.ended = threading.Event()
        self._faults = list(faults)
        self._answer, self._policy = answer, policy
        service = self

        class Handler(_Handler):
            server_name, remote = name, service

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}
        )

    def record(self, body: dict[str, Any], key: str | None) -> str | None:
        """Record a request and return the fault to simulate."""
        self.times.append(time.monotonic())
        self.requests.append(body)
        self.keys.append(key)
        return self._faults.pop(0) if self._faults else None

    def refusal(self, body: dict[str, Any]) -> Refusal | None:
        return self._policy(body)

    def events(self, body: dict[str, Any]) -> list[str]:
        """Return the events of a streamed answer. Raises RuntimeError if `answer` does."""
        answer = self._answer(body["messages"])
        limits = [body.get("max_completion_tokens"), body.get("max_tokens")]
        if self._policy is like_old:
            limits = limits[1:]
        tokens = answer.split(" ")
        limit = min((number for number in limits if number is not None), default=len(tokens))
        reason = "stop" if len(tokens) <= limit else "length"
        deltas: list[dict[str, Any]] = [
            {"choices": [{"index": 0, "delta": {"content": f"{' ' if n else ''}{token}"}}]}
            for n, token in enumerate(tokens[:limit])
        ]
        deltas.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        if body.get("stream_options", {}).get("include_usage") or self._policy is like_old:
            usage = _USAGE | {"completion_tokens": len(tokens[:limit])}
            deltas.append({"choices": [], "usage": usage})
        return [f"data: {json.dumps(delta)}\n\n" for delta in deltas] + ["data: [DONE]\n\n"]

    def __enter__(self) -> "RemoteService":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    server_name: str
    remote: RemoteService

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send({"object": "list", "data": [{"id": self.server_name, "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        fault = self.remote.record(body, self.headers.get("authorization"))
        if fault == "hang":
            self.remote.ended.wait()
            return
        if fault == "html":
            self._send("<html>Bad gateway</html>", 502, **{"content-type": "text/html"})
            return
        if fault and fault.isdigit():
            message = {"error": {"message": "Slow down.", "type": "rate", "code": None}}
            self._send(message, int(fault), **{"retry-after": "0.2"})
            return
        if refusal := self.remote.refusal(body):
            self._send(refusal[1], refusal[0])
            return
        try:
            events = self.remote.events(body)
        except RuntimeError as error:
            self._send({"error": {"message": str(error)}}, 500, **{"x-should-retry": "false"})
            return
        if fault == "error":
            events[1:] = ['data: {"error": {"message": "the model crashed"}}\n\n']
        if fault in ("cut", "stall"):
            events = events[:1]
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write("".join(events).encode())
        self.wfile.flush()
        if fault == "stall":
            self.remote.ended.wait()

    def _send(self, value: Any, status: int = 200, **headers: str) -> None:
        content = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.send_response(status)
        for name, text in ({"content-type": "application/json"} | headers).items():
            self.send_header(name, text)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
