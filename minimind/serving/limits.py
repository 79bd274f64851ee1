"""Limits of the service: sizes, timeouts, queue length."""

from dataclasses import dataclass, field
from typing import Any


def _limit(default: float, meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Limits:
    """Limits of one service. The HTTP reference is generated from these fields."""

    body_bytes: int = _limit(1024 * 1024, "Maximum size of a request body in bytes; then 413.")
    header_seconds: float = _limit(10, "Seconds for the headers of a request to arrive; then 408.")
    body_seconds: float = _limit(30, "Seconds for the body of a request to arrive; then 408.")
    write_seconds: float = _limit(
        30, "Seconds a client may leave sent data unread; then the connection is closed."
    )
    connections: int = _limit(512, "Maximum open connections; further ones are closed.")
    queue: int = _limit(
        64, "Maximum queued answers per model (`--queue`), each choice counted; then 429."
    )
    grace_seconds: float = _limit(
        2, "Seconds that running answers may continue after SIGTERM or Ctrl-C."
    )
    failed_seconds: float = _limit(
        5, "Seconds from an engine failure, reported by /health, to the exit with status 1."
    )


# After an error response the connection stays open this long and incoming data is discarded:
# closing at once would reset the connection before the client reads the response.
DRAIN_SECONDS = 1.0
