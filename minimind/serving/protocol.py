"""HTTP over a connection that cannot be held for ever."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from minimind.serving.limits import Limits

_TIMEOUT = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
)
_TIMEOUT_BODY = (
    b'{"error":{"message":"The request was not complete in time.",'
    b'"type":"invalid_request_error","param":null,"code":"request_timeout"}}'
)


def bounded_protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's protocol, with bounds on what it leaves open: uvicorn itself waits for ever for
    the headers of a request, and for a client that does not read.
    """

    class Bounded(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None

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
            if not self.transport.is_closing():
                length = f"content-length: {len(_TIMEOUT_BODY)}\r\n\r\n".encode()
                self.transport.write(_TIMEOUT + length + _TIMEOUT_BODY)
                self.transport.close()

        @staticmethod
        def _stop(timer: asyncio.TimerHandle | None) -> None:
            if timer is not None:
                timer.cancel()

    return Bounded
