"""Server-sent events in OpenAI's format, and cancellation when a client disconnects."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minimind.serving.errors import APIError
from minimind.serving.logs import LOG_FIELDS

# nginx's status for a client that disconnected; only in log and metrics
CLIENT_CLOSED_REQUEST = 499

T = TypeVar("T")

PING_SECONDS = 15.0  # proxies commonly close a connection after 60 idle seconds

_DONE = b"data: [DONE]\n\n"
_PING = b": waiting\n\n"  # a comment, which SSE clients ignore


class ClientDisconnected(Exception):
    """The client closed the connection before the response was complete."""


class EventStream(Response):
    """Send events until they end or the client disconnects, with comments as keep-alive.

    `finish` is always called at the end. An APIError becomes the last event, because the status
    has already been sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[Mapping[str, Any]],
        finish: Callable[[], None],
        headers: Mapping[str, str],
    ) -> None:
        # Proxies must neither cache nor buffer the events (x-accel-buffering is nginx's header).
        super().__init__(
            headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._events = events
        self._finish = finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await cancel_on_disconnect(self._send_all(send), receive)
        except ClientDisconnected:
            scope[LOG_FIELDS]["client_disconnected"] = True
        finally:
            self._finish()

    async def _send_all(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )

        loop = asyncio.get_running_loop()
        last_write = loop.time()

        async def write(data: bytes, more: bool = True) -> None:
            nonlocal last_write
            last_write = loop.time()
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async def keep_alive() -> None:
            while True:
                await asyncio.sleep(last_write + PING_SECONDS - loop.time())
                if loop.time() >= last_write + PING_SECONDS:
                    await write(_PING)

        pings = asyncio.ensure_future(keep_alive())
        try:
            async for event in self._events:
                await write(_encode_event(event))
        except APIError as error:
            await write(_encode_event(error.body.model_dump()))
        finally:
            pings.cancel()
        await write(_DONE, more=False)


def _encode_event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


async def cancel_on_disconnect(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Return the result of `work`; cancel it and raise ClientDisconnected if the client leaves."""
    task = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        disconnected.cancel()
        task.cancel()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
