"""Errors in OpenAI's format: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from minimind.serving.requests import UNSUPPORTED
from minimind.serving.schema import ErrorBody, ErrorResponse


class ErrorCode(NamedTuple):
    """HTTP status of an error code, and when it is returned."""

    status: int
    meaning: str


# Every `code` of the service. The HTTP reference is generated from this table.
ERROR_CODES = {
    "invalid_json": ErrorCode(400, "The body is not a JSON object."),
    "invalid_content_type": ErrorCode(400, "The content type of the body is not JSON."),
    "invalid_http": ErrorCode(400, "The request is not valid HTTP/1.1."),
    "missing_required_parameter": ErrorCode(400, "A required parameter is missing."),
    "unknown_parameter": ErrorCode(400, "A parameter exists neither here nor at OpenAI."),
    "unsupported_parameter": ErrorCode(400, "A parameter of OpenAI's API is not supported."),
    "invalid_value": ErrorCode(
        400, "A parameter has the wrong type, is out of range, or contradicts another."
    ),
    "context_length_exceeded": ErrorCode(400, "The prompt leaves no room in the context."),
    "invalid_api_key": ErrorCode(401, "The API key is missing or wrong."),
    "host_not_allowed": ErrorCode(
        403, "Without an API key, the Host header must name localhost or a loopback address."
    ),
    "model_not_found": ErrorCode(404, "No model of this name is served."),
    "not_found": ErrorCode(404, "The path does not exist."),
    "method_not_allowed": ErrorCode(405, "The path does not support the method."),
    "request_timeout": ErrorCode(408, "The request did not arrive completely in time."),
    "request_too_large": ErrorCode(413, "The body is too large."),
    "queue_full": ErrorCode(429, "The queue is full; retry after the seconds in Retry-After."),
    "generation_failed": ErrorCode(500, "Generation failed for this request."),
    "internal_error": ErrorCode(500, "A bug in the service; the log has the request ID."),
    "engine_failed": ErrorCode(
        503, "A device error stopped the engine; the service must be restarted."
    ),
    "stopping": ErrorCode(503, "The service is shutting down."),
}


class APIError(Exception):
    """An error that is returned to the client; `code` is a key of ERROR_CODES."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = ERROR_CODES[code].status
        self.headers = dict(headers or {})
        self.body = error_body(self.status, message, param=param, code=code)

    def response(self) -> JSONResponse:
        """Return the error as a response."""
        return JSONResponse(self.body.model_dump(), self.status, self.headers)


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> ErrorResponse:
    """Return the body of an error; its type follows from the status."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if status == 429 else kind
    return ErrorResponse(error=ErrorBody(message=message, type=kind, param=param, code=code))


def http_error_response(error: HTTPException) -> JSONResponse:
    """Convert an error of the router, such as an unknown path."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    body = error_body(error.status_code, error.detail, code=code)
    return JSONResponse(body.model_dump(), error.status_code, error.headers)


def validation_error(errors: Sequence[Any]) -> APIError:
    """Convert pydantic's errors: report the first one by its field, without the field's value."""
    # An unknown field is reported only if nothing else is wrong.
    first = min(errors, key=lambda error: error["type"] == "extra_forbidden")
    if isinstance(first.get("input"), bytes):  # FastAPI parses no other content type as JSON
        return APIError(
            "invalid_content_type",
            "The request body must be sent with 'content-type: application/json'.",
        )
    is_object = first["loc"] != ("body",) or first["type"] == "too_many_keys"
    if first["type"] == "json_invalid" or not is_object:
        reason = first.get("ctx", {}).get("error", first["msg"])
        return APIError("invalid_json", f"The request body is not a JSON object: {reason}.")
    field = ".".join(str(part) for part in _field_path(first["loc"])) or "body"
    if first["type"] == "extra_forbidden":
        if field.partition(".")[0] in UNSUPPORTED:
            message = f"Unsupported parameter: '{field}' is not supported by this service."
            return APIError("unsupported_parameter", message, param=field)
        return APIError("unknown_parameter", f"Unknown parameter: '{field}'.", param=field)
    if first["type"] == "missing":
        message = f"Missing required parameter: '{field}'."
        return APIError("missing_required_parameter", message, param=field)
    return APIError("invalid_value", f"Invalid value for '{field}': {first['msg']}.", param=field)


def _field_path(location: Sequence[Any]) -> list[Any]:
    """Return the path inside the body, without the tags of unions that pydantic inserts."""
    _, *path = location
    return path[:1] + [part for part in path[1:] if not _is_union_tag(str(part))]


def _is_union_tag(part: str) -> bool:
    return part in ("str", "[key]") or part.startswith("list[")


def internal_error(request_id: str) -> APIError:
    """Return the error for an unexpected exception; the log has the details under the ID."""
    return APIError("internal_error", f"Internal server error; see {request_id} in the log.")
