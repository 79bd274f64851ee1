"""HTTP/1.1 with header and write timeouts (protection against slow clients, "slowloris")."""

import asyncio
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from minimind.serving.errors import APIError
from minimind.serving.limits import DRAIN_SECONDS, Limits

_TIMEOUT = APIError("request_timeout", "The request headers were not complete in time.")
_MALFORMED = APIError("invalid_http", "This is not a valid HTTP request.")


class TimeoutProtocol(H11Protocol):
    """uvicorn's HTTP protocol with timeouts and a maximum number of connections.

    uvicorn itself waits indefinitely for the headers of a request, and for a client that does not
    read.
    """

    limits: Limits
    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _rejected = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.abort()
            return
        self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel(self._header_timer)
        self._cancel(self._write_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._rejected:
            return
        cycle = self.cycle
        if self._header_timer is None and (cycle is None or cycle.response_complete):
            self._start_header_timer()
        super().data_received(data)
        if self.cycle is not cycle:  # headers complete; BodyLimitMiddleware limits the body
            self._cancel(self._header_timer)
            self._header_timer = None

    def pause_writing(self) -> None:
        super().pause_writing()
        # abort, not close: close waits until the client has read the send buffer.
        self._write_timer = self.loop.call_later(self.limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._cancel(self._write_timer)
        super().resume_writing()

    def _start_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(
            self.limits.header_seconds, self._reject, _TIMEOUT
        )

    def send_400_response(self, msg: str) -> None:
        # No error response can be sent in the middle of another response.
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._reject(_MALFORMED)
        else:
            self.transport.close()

    def _reject(self, error: APIError) -> None:
        """Send an error and close the connection after discarding incoming data."""
        if self._rejected or self.transport.is_closing():
            return
        self._rejected = True
        body = error.body.model_dump_json().encode()
        self.transport.write(
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
            "content-type: application/json\r\nconnection: close\r\n"
            f"content-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        self.transport.write_eof()
        self.loop.call_later(DRAIN_SECONDS, self.transport.abort)

    @staticmethod
    def _cancel(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


def protocol_with_timeouts(limits: Limits) -> type[TimeoutProtocol]:
    """Return the protocol class for `limits`: uvicorn takes a class, not an instance."""
    return type("LimitedProtocol", (TimeoutProtocol,), {"limits": limits})
