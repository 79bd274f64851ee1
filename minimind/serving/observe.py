"""Every request is timed, counted and logged, and gets a number; nothing that it says is kept."""

import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minimind.serving.errors import APIError
from minimind.serving.logs import described, log
from minimind.serving.metrics import Metrics
from minimind.serving.streaming import ClientGone

FIGURES = "minimind.figures"  # the key in an ASGI scope of what routes have to add to the log
_METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH")
_CLIENT_GONE = 499  # as nginx calls it


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
        status = _CLIENT_GONE

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except ClientGone:
            pass
        except Exception as error:
            figures |= described(error)
            if status == _CLIENT_GONE:
                failed = APIError(500, "The service failed; its log says where.")
                await failed.response()(scope, receive, observed)
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
