"""Authentication: a key on all routes but a few; without one, requests from this machine alone."""

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from minimind.environment import KEY_VARIABLE
from minimind.errors import UsageError
from minimind.serving.errors import APIError

HEALTH = "/health"
# A browser sends no key with a page, and the docs hold no secret; requests made from them need it.
DOCS = {"/docs", "/openapi.json"}
DOCS |= {f"/static-offline-docs/{name}" for name in ("swagger-ui.css", "favicon.png")}
DOCS.add("/static-offline-docs/swagger-ui-bundle.js")


def check_exposure(host: str, keys: Sequence[str]) -> None:
    """Raise UsageError where a service without a key would listen beyond this machine."""
    if any(not key.strip() or not key.isascii() or key != key.strip() for key in keys):
        raise UsageError("a key is empty, or has spaces at its ends or characters beyond ASCII")
    if not keys and not is_loopback(host):
        raise UsageError(
            f"--host {host} listens beyond this machine, and then every request needs a key: "
            f"give one with --api-key KEY, or in the variable {KEY_VARIABLE}"
        )


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine and is reached from nowhere else."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class RequireKey:
    """ASGI middleware: 401 without one of the keys, before anything of the body is read.

    /health and the docs need none.

    Without keys the service is on this machine alone; requests then must name this machine as
    their host, so that no web page can reach it through a name that it points here (DNS
    rebinding).
    """

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = None
        if scope["type"] == "http" and scope["path"] != HEALTH:
            headers = Headers(scope=scope)
            if not self._digests:
                error = _check_host(headers)
            elif scope["path"] not in DOCS:
                error = self._check_key(headers)
        if error is None:
            await self._app(scope, receive, send)
        else:
            await error.response()(scope, receive, send)

    def _check_key(self, headers: Headers) -> APIError | None:
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip().encode())
        # Digests have one length, and all are compared: the time tells nothing about the keys.
        right = [hmac.compare_digest(given, digest) for digest in self._digests]
        if kind.lower() == "bearer" and any(right):
            return None
        told = "Incorrect API key provided." if key else "You didn't provide an API key."
        return APIError(
            401,
            f"{told} Send it in the header: Authorization: Bearer KEY.",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


def _check_host(headers: Headers) -> APIError | None:
    host = headers.get("host", "localhost")
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if is_loopback(name):
        return None
    return APIError(
        403,
        "Without a key this service answers on this machine alone, as localhost or 127.0.0.1.",
        code="host_not_allowed",
    )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
