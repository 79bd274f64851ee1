"""HTTP over a connection that cannot be held for ever."""

import asyncio
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from minimind.serving.errors import APIError
from minimind.serving.limits import DRAIN_SECONDS, Limits

_TIMEOUT = APIError(408, "The request was not complete in time.", code="request_timeout")
_MALFORMED = APIError(400, "This is not a valid HTTP request.", code="invalid_http")


def bounded_protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's protocol, with bounds on what it leaves open: uvicorn itself waits for ever for
    the headers of a request, and for a client that does not read.
    """

    class Bounded(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None
        _refused = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.abort()
                return
            self._expect_request()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop(self._timer)
            self._stop(self._write_timer)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._refused:
                return
            before = self.cycle
            if self._timer is None and (before is None or before.response_complete):
                self._expect_request()
            super().data_received(data)
            if self.cycle is not before:
                self._stop(self._timer)  # from here on the body has a limit of its own
                self._timer = None

        def pause_writing(self) -> None:
            super().pause_writing()
            # abort, for close would first wait until the client has read the rest
            self._write_timer = self.loop.call_later(limits.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._stop(self._write_timer)
            super().resume_writing()

        def _expect_request(self) -> None:
            self._timer = self.loop.call_later(limits.header_seconds, self._too_slow)

        def _too_slow(self) -> None:
            self._refuse(_TIMEOUT)

        def send_400_response(self, msg: str) -> None:
            # Into the middle of an answer nothing else can be said.
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self._refuse(_MALFORMED)
            else:
                self.transport.close()

        def _refuse(self, error: APIError) -> None:
            if not (self._refused or self.transport.is_closing()):
                self._refused = True
                body = error.answer.model_dump_json().encode()
                self.transport.write(
                    f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
                    "content-type: application/json\r\nconnection: close\r\n"
                    f"content-length: {len(body)}\r\n\r\n".encode()
                    + body
                )
                self.transport.write_eof()
                self.loop.call_later(DRAIN_SECONDS, self.transport.abort)

        @staticmethod
        def _stop(timer: asyncio.TimerHandle | None) -> None:
            if timer is not None:
                timer.cancel()

    return Bounded
