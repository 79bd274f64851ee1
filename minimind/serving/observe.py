"""ASGI middleware that gives each request an ID, measures, counts and logs it."""

import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minimind.serving.errors import internal_error
from minimind.serving.logs import LOG_FIELDS, exception_fields, log
from minimind.serving.metrics import Metrics
from minimind.serving.streaming import CLIENT_CLOSED_REQUEST

REQUEST_ID = "minimind.request_id"  # ASGI scope key
_METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH")


class ObserveMiddleware:
    """The outermost middleware. Also answers 500 to exceptions that nothing else handles."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        start_time = time.monotonic()
        request_id = scope[REQUEST_ID] = f"req_{uuid.uuid4().hex}"
        log_fields = scope[LOG_FIELDS] = {}
        status = CLIENT_CLOSED_REQUEST  # until a response starts

        async def send_observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_observed)
        except Exception as error:
            log_fields |= exception_fields(error)
            if status == CLIENT_CLOSED_REQUEST:
                await internal_error(request_id).response()(scope, receive, send_observed)
        finally:
            self._record(scope, status, time.monotonic() - start_time)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        # The path and method of a request may contain anything: only known ones are recorded.
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.requests.labels(route, status).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        log(
            "request",
            id=scope[REQUEST_ID],
            method=method,
            route=route,
            status=status,
            seconds=round(seconds, 4),
            **scope[LOG_FIELDS],
        )
