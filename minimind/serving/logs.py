"""Structured logs: JSON lines on stderr with token counts and times, never with users' text."""

import json
import logging
import sys
import time
import traceback
import warnings
from typing import Any, TextIO

LOG_FIELDS = "minimind.log_fields"  # ASGI scope key: fields that a route adds to its log line
LOGGER = logging.getLogger("minimind.serving")


def log(event: str, **fields: object) -> None:
    """Log an event at level INFO."""
    LOGGER.info(event, extra={"fields": fields})


class JsonLines(logging.Formatter):
    """Formats records of this package, of uvicorn and of other packages as JSON lines.

    Exceptions are logged with type and traceback only: their message might quote a request.
    """

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage().strip(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line |= exception_fields(record.exc_info[1])
        return json.dumps(line, ensure_ascii=False, default=str)


def exception_fields(error: BaseException) -> dict[str, Any]:
    """Return the type of an exception and its traceback, without its message."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "exception": type(error).__name__,
        "at": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }


def log_to_stderr() -> None:
    """Configure logging of the process, including warnings and other packages."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.getLogger().handlers = [handler]
    for name in (LOGGER.name, "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
    LOGGER.setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    warnings.showwarning = _log_warning


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Log a warning instead of printing it (same signature as `warnings.showwarning`)."""
    fields = {"kind": category.__name__, "message": str(message), "at": f"{filename}:{lineno}"}
    LOGGER.warning("warning", extra={"fields": fields})
