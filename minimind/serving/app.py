"""The ASGI application: routes, error handlers and middleware."""

import json
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from minimind.inference.failures import describe_error
from minimind.serving import chat, completions
from minimind.serving.answers import Answers, stopping_error
from minimind.serving.auth import HEALTH_PATH, INDEX_PATH, APIKeyMiddleware
from minimind.serving.body_limit import BodyLimitMiddleware
from minimind.serving.errors import APIError, http_error_response, internal_error, validation_error
from minimind.serving.limits import Limits
from minimind.serving.logs import LOG_FIELDS
from minimind.serving.metrics import Metrics
from minimind.serving.models import ServedModel
from minimind.serving.observe import REQUEST_ID, ObserveMiddleware
from minimind.serving.preparation import Preparation
from minimind.serving.requests import ChatRequest, CompletionRequest
from minimind.serving.schema import (
    ChatCompletion,
    Completion,
    ErrorResponse,
    Health,
    Index,
    Model,
    ModelList,
)
from minimind.serving.streaming import (
    CLIENT_CLOSED_REQUEST,
    ClientDisconnected,
    EventStream,
    cancel_on_disconnect,
)
from minimind.serving.swagger_ui import DOCS_PATH, add_docs_page
from minimind.version import __version__

_ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The request is invalid or not permitted."},
    "5XX": {"model": ErrorResponse, "description": "The service cannot answer."},
}
_STREAM: dict[str, Any] = {"text/event-stream": {}}  # OpenAPI 3.1 cannot describe the chunks
_PLAIN_TEXT = {"text/plain": {"schema": {"type": "string"}}}


class Service:
    """State shared by the routes: models, metrics and the requests in progress."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self.models = models
        self.metrics = Metrics(list(models.values()))
        self.preparation = Preparation()
        self.is_stopping = False
        self._in_progress: set[Answers] = set()

    @property
    def failure(self) -> str | None:
        """The error that stopped an engine, after which no request is accepted."""
        for model in self.models.values():
            if model.engine.failure is not None:
                return f"the engine of {model.name} stopped: {describe_error(model.engine.failure)}"
        return None

    def find(self, name: str) -> ServedModel:
        """Return a model by name. Raises APIError 404."""
        if name not in self.models:
            raise APIError(
                "model_not_found",
                f"The model '{name[:200]}' does not exist. Available models: "
                f"{', '.join(self.models)}.",
                param="model",
            )
        return self.models[name]

    def cancel_all(self) -> None:
        """Cancel all requests in progress; their clients receive the error `stopping`."""
        self.preparation.cancel_all()
        for answers in list(self._in_progress):
            answers.cancel()

    async def answer(self, request: Request, body: ChatRequest | CompletionRequest) -> Response:
        """Answer a chat or text completion, complete or as a stream."""
        if self.is_stopping:
            raise stopping_error()
        if self.failure is not None:
            message = f"The service has failed and must be restarted: {self.failure}."
            raise APIError("engine_failed", message)
        if body.stream_options is not None and not body.stream:
            raise APIError(
                "invalid_value",
                "'stream_options' requires 'stream' to be true.",
                param="stream_options",
            )
        model = self.find(body.model)
        prepared = await cancel_on_disconnect(
            self.preparation.prepare(body, model), request.receive
        )
        answers = Answers(model, prepared.requests, body.num_choices)
        self._in_progress.add(answers)

        def finish() -> None:
            answers.cancel()
            self._in_progress.discard(answers)
            self._record(request, model, answers)

        is_chat = isinstance(body, ChatRequest)
        head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }
        endpoint: Any = chat if is_chat else completions
        headers = {"minimind-left-out": str(prepared.left_out)} if prepared.left_out else {}
        if body.stream:
            return EventStream(endpoint.stream(head, body, model, answers), finish, headers)
        try:
            completion = await cancel_on_disconnect(
                endpoint.complete(head, body, model, answers), request.receive
            )
        finally:
            finish()
        return Response(
            completion.model_dump_json(), media_type="application/json", headers=headers
        )

    def _record(self, request: Request, model: ServedModel, answers: Answers) -> None:
        """Add token counts and time to first token to metrics and log."""
        usage = answers.usage()
        fields: dict[str, float] = {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.prompt_tokens_details.cached_tokens,
            "completion_tokens": usage.completion_tokens,
        }
        for name, tokens in fields.items():
            getattr(self.metrics, name).labels(model.name).inc(tokens)
        if answers.first_token_time is not None:
            seconds = answers.first_token_time - answers.start_time
            self.metrics.time_to_first_token_seconds.labels(model.name).observe(seconds)
            fields["time_to_first_token_seconds"] = round(seconds, 4)
        request.scope[LOG_FIELDS].update(fields, model=model.name)


class _StrictJSONRoute(APIRoute):
    """Parses JSON with bounded nesting and without NaN, unlike Python's json module."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_StrictJSONRequest(request.scope, request.receive))

        return handle


class _StrictJSONRequest(Request):
    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            # FastAPI converts this exception into a RequestValidationError.
            raise json.JSONDecodeError(str(error), "", 0) from None


def create_app(
    service: Service,
    *,
    keys: Sequence[str] = (),
    limits: Limits | None = None,
    origins: Sequence[str] = (),
) -> ASGIApp:
    """Create the application with its middleware.

    origins: origins whose web pages may send requests from a browser (CORS).
    """
    api = FastAPI(
        title="minimind",
        version=__version__,
        description="OpenAI-compatible API for models trained with minimind.",
        docs_url=None,
        redoc_url=None,
    )
    add_docs_page(api)
    api.include_router(_public_router(service))
    api.include_router(_api_router(service, needs_key=bool(keys)))
    for kind in (APIError, HTTPException, RequestValidationError, ClientDisconnected, Exception):
        api.add_exception_handler(kind, _error_response)
    app: ASGIApp = BodyLimitMiddleware(api, limits=limits or Limits())
    app = APIKeyMiddleware(app, keys=keys)
    if origins:
        app = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["minimind-left-out", "retry-after", "x-request-id"],
        )
    return ObserveMiddleware(app, metrics=service.metrics)


async def _error_response(request: Request, error: Exception) -> Response:
    match error:
        case APIError():
            return error.response()
        case HTTPException():
            return http_error_response(error)
        case RequestValidationError():
            return validation_error(error.errors()).response()
        case ClientDisconnected():
            return Response(status_code=CLIENT_CLOSED_REQUEST)
    return internal_error(request.scope[REQUEST_ID]).response()


def _public_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get(INDEX_PATH)
    async def index(request: Request) -> Index:
        """List the endpoints. Needs no API key."""
        paths: dict[str, dict[str, Any]] = request.app.openapi()["paths"]
        return Index(
            version=__version__,
            docs=DOCS_PATH,
            endpoints=[f"{method.upper()} {path}" for path in paths for method in paths[path]],
        )

    @router.head(HEALTH_PATH, include_in_schema=False)
    @router.get(HEALTH_PATH, response_model_exclude_none=True, responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """Check the health of the service. Needs no API key."""
        if service.failure is not None:
            response.status_code = 503
            return Health(status="failed", reason=service.failure)
        if service.is_stopping:
            response.status_code = 503
        return Health(status="stopping" if service.is_stopping else "ok")

    return router


def _api_router(service: Service, *, needs_key: bool) -> APIRouter:
    # APIKeyMiddleware checks the key; this dependency only adds it to the OpenAPI document.
    dependencies = [Depends(HTTPBearer(auto_error=False))] if needs_key else []
    router = APIRouter(
        route_class=_StrictJSONRoute, responses=_ERROR_RESPONSES, dependencies=dependencies
    )

    @router.get("/metrics", response_class=Response, responses={200: {"content": _PLAIN_TEXT}})
    async def metrics() -> Response:
        """Get metrics in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        """List the served models."""
        return ModelList(data=[_model_object(model) for model in service.models.values()])

    @router.get("/v1/models/{model}")
    async def retrieve_model(model: str) -> Model:
        """Retrieve a model."""
        return _model_object(service.find(model))

    @router.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: {"content": _STREAM}},
    )
    async def create_chat_completion(request: Request, body: ChatRequest) -> Response:
        """Create a chat completion."""
        return await service.answer(request, body)

    @router.post(
        "/v1/completions", response_model=Completion, responses={200: {"content": _STREAM}}
    )
    async def create_completion(request: Request, body: CompletionRequest) -> Response:
        """Create a text completion (legacy)."""
        return await service.answer(request, body)

    return router


def _model_object(model: ServedModel) -> Model:
    return Model(id=model.name, created=model.created, max_model_len=model.context)
