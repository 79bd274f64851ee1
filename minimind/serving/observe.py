"""Every request is timed, counted and logged, and gets a number; nothing that it says is kept."""

import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minimind.serving.errors import failed
from minimind.serving.logs import FIGURES, described, log
from minimind.serving.metrics import Metrics
from minimind.serving.streaming import CLIENT_GONE

_METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH")


class Observe:
    """ASGI middleware, around all others."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        began = time.monotonic()
        number = f"req_{uuid.uuid4().hex}"
        figures = scope[FIGURES] = {}
        status = CLIENT_GONE

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except Exception as error:
            figures |= described(error)
            if status == CLIENT_GONE:  # nothing has been answered
                await failed().response()(scope, receive, observed)
        finally:
            self._tell(scope, number, status, time.monotonic() - began)

    def _tell(self, scope: Scope, number: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")  # what was asked for may be anything
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.requests.labels(route, status).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        log(
            "request",
            id=number,
            method=method,
            route=route,
            status=status,
            seconds=round(seconds, 4),
            **scope[FIGURES],
        )
