"""Errors as OpenAI writes them: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from minimind.serving.requests import UNSUPPORTED
from minimind.serving.schema import ErrorAnswer, ErrorBody

_CODES = {404: "not_found", 405: "method_not_allowed"}


class APIError(Exception):
    """An error that is told to the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        kind = "server_error" if status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if status == 429 else kind
        self.answer = ErrorAnswer(
            error=ErrorBody(message=message, type=kind, param=param, code=code)
        )

    def response(self) -> JSONResponse:
        """The same as a response."""
        return JSONResponse(self.answer.model_dump(), self.status, self.headers)


def from_http(error: HTTPException) -> APIError:
    """What the router says: no such path, no such method."""
    code = _CODES.get(error.status_code)
    return APIError(error.status_code, error.detail, code=code, headers=error.headers)


def from_validation(errors: Sequence[Any]) -> APIError:
    """The first thing that is wrong with a request, named by its field, without its value."""
    first = min(errors, key=lambda error: error["type"] == "extra_forbidden")  # these come last
    if isinstance(first.get("input"), bytes):  # FastAPI reads no JSON out of another type
        message = "The body is not sent as JSON: send it with 'content-type: application/json'."
        return APIError(400, message, code="invalid_content_type")
    is_object = first["loc"] != ("body",) or first["type"] == "too_many_keys"
    if first["type"] == "json_invalid" or not is_object:
        why = first.get("ctx", {}).get("error", first["msg"])
        return APIError(400, f"The body is not a JSON object: {why}.", code="invalid_json")
    field = ".".join(str(part) for part in _of_the_sender(first["loc"])) or "body"
    name = field.partition(".")[0]
    if first["type"] == "extra_forbidden":
        if name in UNSUPPORTED:
            message = f"Unsupported parameter: '{field}' is not offered by this service."
            return APIError(400, message, param=field, code="unsupported_parameter")
        message = f"Unknown parameter: '{field}'."
        return APIError(400, message, param=field, code="unknown_parameter")
    if first["type"] == "missing":
        message = f"Missing required parameter: '{field}'."
        return APIError(400, message, param=field, code="missing_required_parameter")
    message = f"Invalid value for '{field}': {first['msg']}."
    return APIError(400, message, param=field, code="invalid_value")


def _of_the_sender(location: Sequence[Any]) -> list[Any]:
    """The path inside the body, without the names that pydantic gives to kinds of values."""
    _, *path = location
    return path[:1] + [part for part in path[1:] if not _is_kind(str(part))]


def _is_kind(part: str) -> bool:
    return part in ("str", "[key]") or part.startswith("list[")


def failed() -> APIError:
    """What a client is told of a mistake of ours."""
    return APIError(500, "The service failed; its log says where.", code="internal_error")
