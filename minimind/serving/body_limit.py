"""ASGI middleware that reads request bodies within limits of size and time."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minimind.serving.errors import APIError
from minimind.serving.limits import DRAIN_SECONDS, Limits


class BodyLimitMiddleware:
    """Read the complete body before the application sees the request.

    Responds with 413 to a body that is too large (immediately if its Content-Length says so), 408
    to one that is too slow, 400 to one with both Content-Length and Transfer-Encoding.
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
            await _send_error(error, receive, send)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body, or None if the client disconnects."""
        max_bytes = self._limits.body_bytes
        headers = Headers(scope=scope)
        if "transfer-encoding" in headers and "content-length" in headers:
            # Request smuggling: a proxy in front may believe the other header.
            raise APIError(
                "invalid_http",
                "The request has both a Content-Length and a Transfer-Encoding header. Send one.",
            )
        # The HTTP parser has checked that Content-Length is a number.
        if int(headers.get("content-length", "0")) > max_bytes:
            raise _too_large(max_bytes)
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > max_bytes:
                        raise _too_large(max_bytes)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            seconds = self._limits.body_seconds
            raise APIError(
                "request_timeout", f"The request body was not complete after {seconds:g} seconds."
            ) from None


def _too_large(max_bytes: int) -> APIError:
    return APIError("request_too_large", f"The request body is larger than {max_bytes:,} bytes.")


async def _send_error(error: APIError, receive: Receive, send: Send) -> None:
    """Send an error, discard the rest of the body for a while, and close the connection."""
    body = error.body.model_dump_json().encode()
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


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a receive channel that yields `body` first, then what `receive` yields."""
    replayed = False

    async def channel() -> Message:
        nonlocal replayed
        if replayed:
            return await receive()
        replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return channel
