"""A client of any service that speaks OpenAI's API, with nothing but Python's own HTTP."""

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

_OURS = "minimind"
_SECONDS = 120  # without a single byte
_LONGEST_LINE = 10 * 1024 * 1024

Message = Mapping[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True)
class ModelInfo:
    """A model of a service."""

    name: str
    is_ours: bool  # knows what OpenAI's API lacks


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None  # a key is for the place that it was given for


class Client:
    """Talks to the service at `url`, with or without /v1 at its end."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Raises UsageError for what is no URL of a service."""
        parts = _split(url if "//" in url else f"http://{url}")
        if parts is None:
            raise UsageError(f"{url} is not the URL of a service, such as http://127.0.0.1:8000")
        path = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{path}/v1"
        self._headers = {"content-type": "application/json"}
        if key:
            self._headers["authorization"] = f"Bearer {key}"
        here = parts.hostname in ("localhost", "127.0.0.1", "::1")
        proxies = [urllib.request.ProxyHandler({})] if here else []
        self._opener = urllib.request.build_opener(_NoRedirects, *proxies)

    def models(self) -> list[ModelInfo]:
        """The models that are served. Raises ServiceError."""
        with self._open("/models") as response:
            try:
                found = json.loads(response.read(_LONGEST_LINE))["data"]
                return [ModelInfo(m["id"], m.get("owned_by") == _OURS) for m in found]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ServiceError(f"{self.url}/models does not speak OpenAI's API") from None

    def chat(self, model: ModelInfo, messages: Sequence[Message], **settings: Any) -> "Answer":
        """An answer as it is written; settings are those of OpenAI's API. Raises ServiceError."""
        body: dict[str, Any] = {"model": model.name, "messages": list(messages), "stream": True}
        body |= {name: value for name, value in settings.items() if value is not None}
        body["stream_options"] = {"include_usage": True}
        if model.is_ours:
            body["truncation"] = "auto"
        return Answer(self._open("/chat/completions", json.dumps(body).encode()), self.url)

    def _open(self, path: str, body: bytes | None = None) -> HTTPResponse:
        request = urllib.request.Request(self.url + path, data=body, headers=self._headers)
        try:
            return self._opener.open(request, timeout=_SECONDS)
        except urllib.error.HTTPError as error:
            with error:
                raise ServiceError(self._told(error.code, error.read(65536))) from None
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ServiceError(
                f"{self.url} cannot be reached ({reason}); is it running? "
                "`minimind serve MODEL` starts a service"
            ) from None

    def _told(self, status: int, body: bytes) -> str:
        if status == 401:
            return f"{self.url} wants a key; set it in the variable {KEY_VARIABLE}"
        try:
            message = json.loads(body)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = "it does not say why"
        return f"{self.url} answers {status}: {message}"


def _split(url: str) -> SplitResult | None:
    """Its parts; None where a service cannot have it."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 (reading it is what checks it)
    except ValueError:
        return None
    fits = parts.scheme in ("http", "https") and parts.hostname and not parts.query
    return parts if fits else None


class Answer:
    """Iterate for its text; close it, or leave its `with` block, to have no more of it written."""

    def __init__(self, response: HTTPResponse, url: str) -> None:
        self._response = response
        # A handle of its own: that of the response may be closed, and be another's, at any time.
        self._connection = None
        if not response.isclosed():
            kind = (socket.AF_INET, socket.SOCK_STREAM)
            self._connection = socket.fromfd(response.fileno(), *kind)
        self._url = url
        self.finish_reason: str | None = None
        self.tokens: int | None = None  # that it has, once it is finished
        self.left_out = int(response.headers.get("minimind-left-out") or 0)  # messages not seen

    def __enter__(self) -> "Answer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the service then frees its slot."""
        self._response.close()
        if self._connection is not None:
            self._connection.close()

    def break_off(self) -> None:
        """End the connection under another thread, which may be waiting for the next piece."""
        with contextlib.suppress(OSError):  # it has ended already
            if self._connection is not None:
                self._connection.shutdown(socket.SHUT_RDWR)

    def __iter__(self) -> Iterator[str]:
        """Raises ServiceError when the service breaks off."""
        try:
            for event in self._events():
                if text := self._take(event):
                    yield text
        except (OSError, HTTPException) as error:
            raise ServiceError(f"{self._url} broke off in the middle: {error}") from None
        finally:
            self.close()

    def _events(self) -> Iterator[dict[str, Any]]:
        while line := self._response.readline(_LONGEST_LINE):
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            try:
                event = json.loads(data)
            except ValueError:
                raise ServiceError(f"{self._url} sends what is not JSON") from None
            if isinstance(event, dict):
                yield event
        raise ServiceError(f"{self._url} broke off in the middle")

    def _take(self, event: dict[str, Any]) -> str:
        if error := event.get("error"):
            told = error.get("message") if isinstance(error, dict) else error
            raise ServiceError(f"{self._url}: {told}")
        try:
            if usage := event.get("usage"):
                self.tokens = usage["completion_tokens"]
            for choice in event.get("choices") or ():
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
                return str(choice["delta"].get("content") or "")
        except (KeyError, TypeError, AttributeError):
            raise ServiceError(f"{self._url} does not stream as OpenAI does") from None
        return ""
