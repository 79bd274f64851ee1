"""Preparation of requests outside the event loop: tokenization, and compilation of JSON schemas."""

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from minimind.inference.grammar import CHECK_SECONDS
from minimind.serving.answers import stopping_error
from minimind.serving.engine_requests import EngineRequests, prepare_chat, prepare_completion
from minimind.serving.errors import APIError
from minimind.serving.models import ServedModel
from minimind.serving.requests import ChatRequest, CompletionRequest

_SCHEMA_THREADS = 2


class Preparation:
    """Threads that prepare requests. Used only in the event loop.

    Requests with a JSON schema have their own threads: the check of a schema takes up to
    CHECK_SECONDS. No thread is joined, so that the service can end while they work.
    """

    def __init__(self) -> None:
        self._text_threads = ThreadPoolExecutor(thread_name_prefix="minimind-prepare")
        self._schema_threads = ThreadPoolExecutor(_SCHEMA_THREADS, "minimind-schema")
        self._num_schemas = Counter[str]()  # requests with a schema, by model
        self._unfinished: set[asyncio.Future[EngineRequests]] = set()
        self._is_stopping = False

    async def prepare(
        self, body: ChatRequest | CompletionRequest, model: ServedModel
    ) -> EngineRequests:
        """Convert an API request in a thread. Raises APIError."""
        if isinstance(body, CompletionRequest):
            return await self._run(self._text_threads, partial(prepare_completion, body, model))
        prepare = partial(prepare_chat, body, model)
        if body.json_schema is None:
            return await self._run(self._text_threads, prepare)
        if self._num_schemas[model.name] >= model.queue.capacity:
            raise APIError(
                "queue_full",
                "Too many JSON schemas are being compiled. Retry later.",
                headers={"retry-after": str(CHECK_SECONDS)},
            )
        self._num_schemas[model.name] += 1
        try:
            return await self._run(self._schema_threads, prepare)
        finally:
            self._num_schemas[model.name] -= 1

    async def _run(
        self, threads: ThreadPoolExecutor, prepare: Callable[[], EngineRequests]
    ) -> EngineRequests:
        if self._is_stopping:
            raise stopping_error()
        # When the client leaves, the future is cancelled; if it is queued, it never starts.
        future = asyncio.get_running_loop().run_in_executor(threads, prepare)
        self._unfinished.add(future)
        try:
            return await future
        except asyncio.CancelledError:
            if self._is_stopping:
                raise stopping_error() from None
            raise
        finally:
            self._unfinished.discard(future)

    def cancel_all(self) -> None:
        """Let unfinished and later requests fail with the error `stopping`."""
        self._is_stopping = True
        for future in self._unfinished:
            future.cancel()

    def close(self) -> None:
        """End the threads as soon as they are idle, without waiting for them."""
        for threads in (self._text_threads, self._schema_threads):
            threads.shutdown(wait=False, cancel_futures=True)
