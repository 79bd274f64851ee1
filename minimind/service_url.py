"""Base URLs of OpenAI-compatible services."""

import re
from urllib.parse import urlsplit

from minimind.errors import UsageError


def parse_service_url(text: str) -> tuple[str, bool]:
    """Return the base URL of the API, and True if its host is local. Raises UsageError."""
    try:
        parts = urlsplit(text if "//" in text else f"http://{text}")
        valid = parts.scheme in ("http", "https") and parts.hostname and not parts.query
        parts.port  # noqa: B018 (raises ValueError for an invalid port)
    except ValueError:
        valid = False
    if not valid:
        raise UsageError(
            f"{text} is not the URL of a service; give one such as http://127.0.0.1:8000"
        )
    path = parts.path.rstrip("/")
    if not re.search(r"/(v\d\w*|openai)$", path):  # some services use another version path
        path += "/v1"
    is_local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    return f"{parts.scheme}://{parts.netloc}{path}", is_local
