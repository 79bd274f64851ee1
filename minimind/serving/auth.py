"""Authentication: API keys; without a key, only requests from this machine."""

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from minimind.environment import KEY_VARIABLE
from minimind.errors import UsageError
from minimind.serving.errors import APIError
from minimind.serving.swagger_ui import DOCS_PATH, STATIC_FILES

HEALTH_PATH, INDEX_PATH = "/health", "/"
# Browsers send no key when they open a page. These contain no secrets, and requests sent from the
# docs need a key.
PUBLIC_PATHS = {INDEX_PATH, DOCS_PATH, "/openapi.json", *STATIC_FILES}


def check_exposure(host: str, keys: Sequence[str]) -> None:
    """Raise UsageError for an invalid key, or if a service without keys would be reachable."""
    if any(not key.strip() or not key.isascii() or key != key.strip() for key in keys):
        raise UsageError(
            "an API key is empty, starts or ends with a space, or has characters outside ASCII"
        )
    if not keys and not is_loopback(host):
        raise UsageError(
            f"--host {host} makes the service reachable from other machines, which requires an API "
            f"key: set the environment variable {KEY_VARIABLE}, or pass --api-key KEY"
        )


def normalized_origin(origin: str) -> str:
    """Return an origin as browsers send it, or "*". Raises UsageError for what no browser sends."""
    if origin == "*":
        return origin
    match = re.fullmatch(r"([a-z][a-z0-9+.-]*)://([^/?#@\s:]+|\[[^]]+\])(:\d+)?/?", origin.lower())
    if match is None:
        raise UsageError(
            f"--cors {origin} is not an origin, such as https://example.com or "
            "http://localhost:3000; * allows all"
        )
    scheme, host, port = match.groups()
    is_default = port == {"http": ":80", "https": ":443"}.get(scheme)
    return f"{scheme}://{host}" + (port or "") * (not is_default)


def is_loopback(host: str) -> bool:
    """Return True for localhost and loopback addresses, which other machines cannot reach."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class APIKeyMiddleware:
    """ASGI middleware that answers 401 without a valid key, before the body is read.

    /health, / and the documentation are public. Without keys, the Host header must name a loopback
    address: otherwise any web page could reach the service through a host name of its own that
    resolves to 127.0.0.1 (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = None
        if scope["type"] == "http" and scope["path"] != HEALTH_PATH:
            headers = Headers(scope=scope)
            if not self._digests:
                error = _check_host(headers)
            elif scope["path"] not in PUBLIC_PATHS:
                error = self._check_key(headers)
        if error is None:
            await self._app(scope, receive, send)
        else:
            await error.response()(scope, receive, send)

    def _check_key(self, headers: Headers) -> APIError | None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip().encode())
        # Digests have equal length and all are compared: the duration reveals nothing about keys.
        matches = [hmac.compare_digest(digest, expected) for expected in self._digests]
        if scheme.lower() == "bearer" and any(matches):
            return None
        reason = "Incorrect API key provided." if key else "You didn't provide an API key."
        return APIError(
            "invalid_api_key",
            f"{reason} Send it in the header: Authorization: Bearer KEY.",
            headers={"www-authenticate": "Bearer"},
        )


def _check_host(headers: Headers) -> APIError | None:
    host = headers.get("host", "localhost")
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if is_loopback(name):
        return None
    return APIError(
        "host_not_allowed",
        "This service has no API key and therefore accepts only requests to localhost. To reach "
        f"it by another name, start it with an API key in {KEY_VARIABLE}.",
    )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
