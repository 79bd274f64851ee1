"""Logs: one JSON object a line, on stderr, with figures and never with what users write."""

import json
import logging
import sys
import time
import traceback
import warnings
from typing import Any, TextIO

FIGURES = "minimind.figures"  # the key in an ASGI scope of what a route adds to its line
LOGGER = logging.getLogger("minimind.serving")


def log(event: str, **fields: object) -> None:
    """One line of it."""
    LOGGER.info(event, extra={"fields": fields})


class JsonLines(logging.Formatter):
    """Our events, and what uvicorn tells.

    Of an exception its kind and where it was raised: its message might quote a request.
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
            line |= described(record.exc_info[1])
        return json.dumps(line, ensure_ascii=False, default=str)


def described(error: BaseException) -> dict[str, Any]:
    """The kind of an exception and the places it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "exception": type(error).__name__,
        "at": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }


def log_to_stderr() -> None:
    """Set up all logging of this process, Python's warnings and other packages' included."""
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
    """Log a warning instead of printing it; the parameters are those of `warnings.showwarning`."""
    fields = {"kind": category.__name__, "message": str(message), "at": f"{filename}:{lineno}"}
    LOGGER.warning("warning", extra={"fields": fields})
