"""A streaming client for OpenAI-compatible services, using only the standard library."""

import contextlib
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import SplitResult, urlsplit

from minimind.environment import KEY_VARIABLE
from minimind.errors import ServiceError, UsageError

_OWNER = "minimind"  # `owned_by` of the models of our own service
_TIMEOUT = 120  # seconds without a single byte
_MAX_LINE_BYTES = 10 * 1024 * 1024
_TRUNCATED = "the connection closed before the end of the answer"

Message = Mapping[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True)
class ModelInfo:
    """A model of a service."""

    name: str
    is_ours: bool  # served by minimind: accepts parameters beyond OpenAI's API


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None  # a redirect would send the API key to another host


class Client:
    """A connection to the service at `url`, which may end in /v1."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Raises UsageError if `url` is not a valid HTTP URL."""
        parts = _parse_url(url if "//" in url else f"http://{url}")
        if parts is None:
            raise UsageError(f"{url} is not the URL of a service, such as http://127.0.0.1:8000")
        path = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{path}/v1"
        self._headers = {"content-type": "application/json"}
        if key:
            self._headers["authorization"] = f"Bearer {key}"
        is_local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        proxies = [urllib.request.ProxyHandler({})] if is_local else []
        self._opener = urllib.request.build_opener(_NoRedirects, *proxies)

    def models(self) -> list[ModelInfo]:
        """List the served models. Raises ServiceError."""
        with self._open("/models") as response:
            try:
                models = json.loads(response.read(_MAX_LINE_BYTES))["data"]
                return [ModelInfo(m["id"], m.get("owned_by") == _OWNER) for m in models]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ServiceError(
                    f"{self.url}/models does not follow OpenAI's API; check the URL"
                ) from None

    def chat(self, model: ModelInfo, messages: Sequence[Message], **settings: Any) -> "Answer":
        """Stream an answer; `settings` are parameters of OpenAI's API. Raises ServiceError."""
        body: dict[str, Any] = {"model": model.name, "messages": list(messages), "stream": True}
        body |= {name: value for name, value in settings.items() if value is not None}
        body["stream_options"] = {"include_usage": True}
        if model.is_ours:
            body["truncation"] = "auto"
        return Answer(self._open("/chat/completions", json.dumps(body).encode()), self.url)

    def _open(self, path: str, body: bytes | None = None) -> HTTPResponse:
        request = urllib.request.Request(self.url + path, data=body, headers=self._headers)
        try:
            return self._opener.open(request, timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            with error:
                raise ServiceError(self._http_error(error.code, error.read(65536))) from None
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ServiceError(
                f"{self.url} cannot be reached ({reason}); is it running? "
                "Start a service with `minimind serve MODEL`"
            ) from None

    def _http_error(self, status: int, body: bytes) -> str:
        if status == 401:
            return f"{self.url} rejected the API key; set the environment variable {KEY_VARIABLE}"
        try:
            message = json.loads(body)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = "no reason given"
        return f"{self.url} answered {status}: {message}"


def _parse_url(url: str) -> SplitResult | None:
    """Return the parts of an HTTP URL, or None if it is not valid for a service."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 (raises ValueError if it is not a port number)
    except ValueError:
        return None
    is_valid = parts.scheme in ("http", "https") and parts.hostname and not parts.query
    return parts if is_valid else None


class Answer:
    """A streamed answer: iterate over its text; close it to cancel generation."""

    def __init__(self, response: HTTPResponse, url: str) -> None:
        self._response = response
        # A duplicate descriptor: the response may close its own at any time, and another file may
        # get the same number.
        self._connection = None
        if not response.isclosed():
            self._connection = socket.fromfd(response.fileno(), socket.AF_INET, socket.SOCK_STREAM)
        self._url = url
        self.finish_reason: str | None = None
        self.tokens: int | None = None  # of the answer; None until reported
        self.left_out = int(response.headers.get("minimind-left-out") or 0)  # messages

    def __enter__(self) -> "Answer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the service then cancels generation."""
        self._response.close()
        if self._connection is not None:
            self._connection.close()

    def abort(self) -> None:
        """End the stream from another thread, even while a reader waits for the next piece."""
        with contextlib.suppress(OSError):  # already closed
            if self._connection is not None:
                self._connection.shutdown(socket.SHUT_RDWR)

    def __iter__(self) -> Iterator[str]:
        """Yield pieces of text. Raises ServiceError if the stream fails."""
        try:
            for event in self._events():
                if text := self._text_of(event):
                    yield text
        except (OSError, HTTPException) as error:
            raise ServiceError(f"{self._url}: {_TRUNCATED}: {error}") from None
        finally:
            self.close()

    def _events(self) -> Iterator[dict[str, Any]]:
        while line := self._response.readline(_MAX_LINE_BYTES):
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            try:
                event = json.loads(data)
            except ValueError:
                raise ServiceError(f"{self._url} sent an event that is not JSON") from None
            if isinstance(event, dict):
                yield event
        raise ServiceError(f"{self._url}: {_TRUNCATED}")

    def _text_of(self, event: dict[str, Any]) -> str:
        """Return the text of an event; record usage and finish reason."""
        if error := event.get("error"):
            message = error.get("message") if isinstance(error, dict) else error
            raise ServiceError(f"{self._url}: {message}")
        try:
            if usage := event.get("usage"):
                self.tokens = usage["completion_tokens"]
            for choice in event.get("choices") or ():
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
                return str(choice["delta"].get("content") or "")
        except (KeyError, TypeError, AttributeError):
            raise ServiceError(f"{self._url} does not stream in OpenAI's format") from None
        return ""
