"""What one client may take: bytes, time, places in the queue."""

import asyncio
import math
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minimind.serving.errors import APIError


@dataclass(frozen=True)
class Limits:
    """Bounds of the service; seconds count from the first byte."""

    body_bytes: int = 1024 * 1024
    header_seconds: float = 10
    body_seconds: float = 30
    write_seconds: float = 30  # how long a client may leave what is written to it unread
    connections: int = 512
    queue: int = 64  # answers that wait for a slot, for each model
    grace_seconds: float = 2  # that running answers get when the service is to end
    failed_seconds: float = 5  # after an error of the engine: /health says why, then the exit


# What comes after a refusal is read and forgotten for so long: a connection that is closed before
# would be reset, and the client would never see the answer.
DRAIN_SECONDS = 1.0


class LimitBody:
    """ASGI middleware: reads the whole body within its bounds, before anything looks into it.

    413 for one that is too long, at once where its length is declared; 408 for one that is too
    slow; 400 for one whose length is declared in two ways.
    """

    def __init__(self, app: ASGIApp, *, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except APIError as error:
            await _refuse(error, receive, send)
            return
        if body is not None:
            await self._app(scope, _after(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None when the client went away."""
        most = self._limits.body_bytes
        headers = Headers(scope=scope)
        if "transfer-encoding" in headers and "content-length" in headers:
            # A proxy in front may go by the other one, and take a part of it for the next request.
            raise APIError(400, "The length of the body is given twice.", code="invalid_http")
        if (
            int(headers.get("content-length", "0")) > most
        ):  # digits alone: the parser has seen to it
            raise _too_long(most)
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise _too_long(most)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            seconds = self._limits.body_seconds
            message_ = f"The request was not complete after {seconds:g} seconds."
            raise APIError(408, message_, code="request_timeout") from None


def _too_long(most: int) -> APIError:
    return APIError(413, f"The request is longer than {most:,} bytes.", code="request_too_large")


async def _refuse(error: APIError, receive: Receive, send: Send) -> None:
    """Answer, and close the connection, on which the rest of the body may still be coming."""
    body = error.answer.model_dump_json().encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            while (await receive()).get("more_body", False):
                pass
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b""})


def _after(body: bytes, receive: Receive) -> Receive:
    """A channel that gives `body` and then what the real one gives."""
    given = False

    async def channel() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return channel


class Queue:
    """Counts the answers of one model that are written or waited for; used in the event loop."""

    def __init__(self, slots: int, waiting: int) -> None:
        self._slots = slots
        self._most = slots + waiting
        self._taken = 0
        self._mean_seconds = 1.0  # that an answer takes, the last ones counting most

    @property
    def waiting(self) -> int:
        """Answers that have no slot yet."""
        return max(self._taken - self._slots, 0)

    def take(self, answers: int) -> None:
        """Raise APIError 429, or 400 for more than will ever fit."""
        if answers > self._most:
            raise APIError(
                400,
                f"The request asks for {answers} answers and at most {self._most} can wait.",
                param="n",
                code="invalid_value",
            )
        if self._taken + answers > self._most:
            wait = math.ceil(self._mean_seconds * (self.waiting + 1) / self._slots)
            raise APIError(
                429,
                "Too many requests are waiting. Try again a little later.",
                code="queue_full",
                headers={"retry-after": str(min(max(wait, 1), 60))},
            )
        self._taken += answers

    def give_back(self, seconds: float) -> None:
        """One answer has ended, so many seconds after it got its place."""
        self._taken -= 1
        assert self._taken >= 0
        self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
