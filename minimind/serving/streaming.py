"""Server-sent events, as OpenAI sends them."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minimind.serving.errors import APIError
from minimind.serving.logs import FIGURES

CLIENT_GONE = 499  # the status in the log, as nginx has it; nobody hears it

T = TypeVar("T")

PING_SECONDS = 15.0  # proxies close a connection on which nothing comes for a minute

_DONE = b"data: [DONE]\n\n"
_PING = b": waiting\n\n"  # a comment, which clients skip


class ClientGone(Exception):
    """The client closed its connection before it had its answer."""


class EventStream(Response):
    """Sends events until they end, or until the client goes away; comments while none come.

    `finish` is called at the end in any case. An error among the events is the last of them: the
    status has been sent by then.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[Mapping[str, Any]],
        finish: Callable[[], None],
        headers: Mapping[str, str],
    ) -> None:
        # No proxy is to keep them or to wait for more of them.
        super().__init__(
            headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._events = events
        self._finish = finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(self._send_all(send), receive)
        except ClientGone:
            scope[FIGURES]["client_gone"] = True
        finally:
            self._finish()

    async def _send_all(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )

        loop = asyncio.get_running_loop()
        last = loop.time()

        async def write(data: bytes, more: bool = True) -> None:
            nonlocal last
            last = loop.time()
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async def ping() -> None:
            while True:
                await asyncio.sleep(last + PING_SECONDS - loop.time())
                if loop.time() >= last + PING_SECONDS:
                    await write(_PING)

        pinging = asyncio.ensure_future(ping())
        try:
            async for event in self._events:
                await write(_event(event))
        except APIError as error:
            await write(_event(error.answer.model_dump()))
        finally:
            pinging.cancel()
        await write(_DONE, more=False)


def _event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """What `work` gives. Raises ClientGone, and gives it up, when the client goes away first."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        gone.cancel()
        working.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
