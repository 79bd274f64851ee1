"""The application: routes, and the layers around them."""

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from minimind.inference.failures import describe_error
from minimind.serving import chat, completions
from minimind.serving.answers import Answers, Asked, ask_chat, ask_completion, stopping
from minimind.serving.auth import RequireKey
from minimind.serving.errors import APIError, failed, from_http, from_validation
from minimind.serving.limits import LimitBody, Limits
from minimind.serving.logs import FIGURES
from minimind.serving.metrics import Metrics
from minimind.serving.models import ServedModel
from minimind.serving.observe import Observe
from minimind.serving.requests import ChatRequest, CompletionRequest
from minimind.serving.schema import (
    ChatCompletion,
    Completion,
    ErrorAnswer,
    Health,
    Model,
    ModelList,
)
from minimind.serving.streaming import CLIENT_GONE, ClientGone, EventStream, unless_gone
from minimind.version import __version__

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request cannot be answered."},
    "5XX": {"model": ErrorAnswer, "description": "The service cannot answer."},
}
_STREAM: dict[str, Any] = {"text/event-stream": {}}  # of chunks, for which OpenAPI has no words


class Service:
    """What the routes share: the models, and the answers that are being written."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self.models = models
        self.metrics = Metrics(list(models.values()))
        self.is_stopping = False
        self._open: set[Answers] = set()

    @property
    def failure(self) -> str | None:
        """Why no model answers any more: the error that stopped the engine of one of them."""
        for model in self.models.values():
            if model.engine.failure is not None:
                return f"the engine of {model.name} stopped: {describe_error(model.engine.failure)}"
        return None

    def find(self, name: str) -> ServedModel:
        """Raises APIError 404 for a model that is not served."""
        if name not in self.models:
            raise APIError(
                404,
                f"The model '{name[:200]}' does not exist here. There are: "
                f"{', '.join(self.models)}.",
                param="model",
                code="model_not_found",
            )
        return self.models[name]

    def cancel_all(self) -> None:
        """End what is being written; each client is told."""
        for answers in list(self._open):
            answers.cancel()

    async def answer(self, request: Request, body: ChatRequest | CompletionRequest) -> Response:
        """A completion of either kind, whole or as a stream."""
        if self.is_stopping:
            raise stopping()
        if self.failure is not None:
            message = f"The service has failed and must be restarted: {self.failure}."
            raise APIError(503, message, code="engine_failed")
        if body.stream_options is not None and not body.stream:
            raise APIError(
                400,
                "'stream_options' needs 'stream' to be true.",
                param="stream_options",
                code="invalid_value",
            )
        model = self.find(body.model)
        chats = isinstance(body, ChatRequest)
        # In a thread: a long text keeps the tokenizer busy.
        prepare: Any = ask_chat if chats else ask_completion
        asked: Asked = await asyncio.to_thread(prepare, body, model)
        answers = Answers(model, asked.requests, body.choices)
        self._open.add(answers)

        def finish() -> None:
            answers.cancel()
            self._open.discard(answers)
            self._count(request, model, answers)

        head = {
            "id": f"{'chatcmpl' if chats else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }
        kind: Any = chat if chats else completions
        headers = {"minimind-left-out": str(asked.left_out)} if asked.left_out else {}
        if body.stream:
            return EventStream(kind.events(head, body, model, answers), finish, headers)
        try:
            done = await unless_gone(kind.whole(head, body, model, answers), request.receive)
        finally:
            finish()
        return Response(done.model_dump_json(), media_type="application/json", headers=headers)

    def _count(self, request: Request, model: ServedModel, answers: Answers) -> None:
        usage = answers.usage()
        figures: dict[str, float] = {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.prompt_tokens_details.cached_tokens,
            "completion_tokens": usage.completion_tokens,
        }
        for name, tokens in figures.items():
            getattr(self.metrics, name).labels(model.name).inc(tokens)
        if answers.first_token_at is not None:
            waited = answers.first_token_at - answers.began
            self.metrics.first_token_seconds.labels(model.name).observe(waited)
            figures["first_token_seconds"] = round(waited, 4)
        request.scope[FIGURES].update(figures, model=model.name)


class _JSONRoute(APIRoute):
    """Reads JSON with a parser that bounds how deep it nests, and takes no NaN."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_JSONRequest(request.scope, request.receive))

        return handle


class _JSONRequest(Request):
    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None  # the one that FastAPI knows


def create_app(
    service: Service,
    *,
    keys: Sequence[str] = (),
    limits: Limits | None = None,
    origins: Sequence[str] = (),
) -> ASGIApp:
    """The routes of `service`, with all that protects them.

    origins: the web pages that may ask from a browser (CORS); none unless given.
    """
    inner = FastAPIOffline(  # its /docs asks no other host for its scripts
        title="minimind",
        version=__version__,
        description="OpenAI's API for models that were trained with minimind.",
        redoc_url=None,
    )
    inner.include_router(_open_routes(service))
    inner.include_router(_routes(service, needs_key=bool(keys)))
    for kind in (APIError, HTTPException, RequestValidationError, ClientGone, Exception):
        inner.add_exception_handler(kind, _answer_error)
    app: ASGIApp = LimitBody(inner, limits=limits or Limits())
    app = RequireKey(app, keys=keys)
    if origins:
        app = CORSMiddleware(
            app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return Observe(app, metrics=service.metrics)


async def _answer_error(request: Request, error: Exception) -> Response:
    match error:
        case APIError():
            return error.response()
        case HTTPException():
            return from_http(error).response()
        case RequestValidationError():
            return from_validation(error.errors()).response()
        case ClientGone():
            return Response(status_code=CLIENT_GONE)
    return failed().response()


def _open_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.head("/health", include_in_schema=False)
    @router.get("/health", response_model_exclude_none=True, responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """Whether the service takes requests; needs no key."""
        if service.failure is not None:
            response.status_code = 503
            return Health(status="failed", reason=service.failure)
        if service.is_stopping:
            response.status_code = 503
        return Health(status="stopping" if service.is_stopping else "ok")

    return router


def _routes(service: Service, *, needs_key: bool) -> APIRouter:
    # The key itself is asked for before any route; this only tells the docs about it.
    told = [Depends(HTTPBearer(auto_error=False))] if needs_key else []
    router = APIRouter(route_class=_JSONRoute, responses=_ERRORS, dependencies=told)

    @router.get("/metrics", response_class=Response, responses={200: {"content": _TEXT}})
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @router.get("/v1/models")
    async def models() -> ModelList:
        """The models that are served."""
        return ModelList(data=[_described(model) for model in service.models.values()])

    @router.get("/v1/models/{model}")
    async def model(model: str) -> Model:
        """One of them."""
        return _described(service.find(model))

    @router.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: {"content": _STREAM}},
    )
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """The next message of a conversation."""
        return await service.answer(request, body)

    @router.post(
        "/v1/completions", response_model=Completion, responses={200: {"content": _STREAM}}
    )
    async def text_completions(request: Request, body: CompletionRequest) -> Response:
        """What comes after a text."""
        return await service.answer(request, body)

    return router


_TEXT = {"text/plain": {"schema": {"type": "string"}}}


def _described(model: ServedModel) -> Model:
    return Model(id=model.name, created=model.created, max_model_len=model.context)
