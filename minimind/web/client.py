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

from minimind.environment import KEY_VARIABLE
from minimind.errors import ServiceError
from minimind.service_url import parse_service_url

_OWNER = "minimind"  # `owned_by` of the models of our own service
_TIMEOUT = 120  # seconds without a single byte
_MAX_LINE_BYTES = 10 * 1024 * 1024
_TRUNCATED = "the connection closed before the end of the answer"
# OpenAI's newer models reject the older name. Other services ignore the newer one silently, so only
# services that name it receive it.
_MAX_TOKENS, _NEWER_MAX_TOKENS = "max_tokens", "max_completion_tokens"
_USAGE = "stream_options"  # some services reject it; then the answer has no token count

Message = Mapping[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True)
class ModelInfo:
    """A model of a service."""

    name: str
    is_ours: bool  # served by minimind: accepts parameters beyond OpenAI's API


class _HTTPError(ServiceError):
    """A response with an error status. body: its start, as text."""

    def __init__(self, message: str, status: int, body: str) -> None:
        super().__init__(message)
        self.status, self.body = status, body


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None  # a redirect would send the API key to another host


class Client:
    """A connection to the service at `url`; see `parse_service_url`."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Raises UsageError if `url` is not a valid HTTP URL."""
        self.url, is_local = parse_service_url(url)
        self._rejected: dict[str, set[str]] = {}  # parameters by model, as in `_rejected_by`
        self._headers = {"content-type": "application/json"}
        if key:
            self._headers["authorization"] = f"Bearer {key}"
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
        body[_USAGE] = {"include_usage": True}
        if model.is_ours:
            body["truncation"] = "auto"
        rejected = self._rejected.setdefault(model.name, set())
        while True:
            for name in rejected & body.keys():
                value = body.pop(name)
                if name == _MAX_TOKENS:
                    body[_NEWER_MAX_TOKENS] = value
            try:
                return Answer(self._open("/chat/completions", json.dumps(body).encode()), self.url)
            except _HTTPError as error:
                names = _rejected_by(error) & body.keys()
                if not names:
                    raise
                rejected |= names

    def _open(self, path: str, body: bytes | None = None) -> HTTPResponse:
        request = urllib.request.Request(self.url + path, data=body, headers=self._headers)
        try:
            return self._opener.open(request, timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            with error:
                content = error.read(65536)
            message = self._error_message(error.code, content)
            raise _HTTPError(message, error.code, content.decode("utf-8", "replace")) from None
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ServiceError(
                f"{self.url} cannot be reached ({reason}); is it running? "
                "Start a service with `minimind serve MODEL`"
            ) from None

    def _error_message(self, status: int, body: bytes) -> str:
        if status == 401:
            return f"{self.url} rejected the API key; set the environment variable {KEY_VARIABLE}"
        try:
            message = json.loads(body)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = "no reason given"
        return f"{self.url} answered {status}: {message}"


def _rejected_by(error: _HTTPError) -> set[str]:
    """Return the parameters that can be renamed or left out, if the response is about them."""
    if error.status not in (400, 422):
        return set()
    # An error that names only the older parameter may be about its value.
    reasons = {_MAX_TOKENS: _NEWER_MAX_TOKENS, _USAGE: _USAGE}
    return {name for name, reason in reasons.items() if reason in error.body}


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
