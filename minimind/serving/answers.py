"""Answers of one request: the bridge from the engine's thread to the event loop."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from minimind.inference.requests import Completion, Piece, Request, TokenLogprob
from minimind.serving.errors import APIError
from minimind.serving.models import ServedModel
from minimind.serving.schema import PromptTokensDetails, Usage


@dataclass
class FinishedAnswer:
    """A complete answer, with log-probabilities if they were requested."""

    text: str = ""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: Any = None


class Answers:
    """The answers to one request while the engine generates them. Created in the event loop."""

    def __init__(self, model: ServedModel, requests: Sequence[Request], choices: int) -> None:
        """Submit `requests`, `choices` per prompt. Raises APIError when the queue is full."""
        model.queue.admit(len(requests))
        self.start_time = time.monotonic()
        self.first_token_time: float | None = None
        self._model = model
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._choices = choices
        self._num_unfinished = len(requests)
        self._completions: list[Completion] = [
            model.engine.submit(request, self._forwarder(index))
            for index, request in enumerate(requests)
        ]

    # --8<-- [start:forwarder]
    def _forwarder(self, index: int) -> Callable[[Piece], None]:
        """Return the callback that the engine's thread calls with each piece of a choice."""

        def forward(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(self._receive, index, piece)

        return forward

    # --8<-- [end:forwarder]

    def _receive(self, index: int, piece: Piece) -> None:
        if self.first_token_time is None and piece.token_ids:
            self.first_token_time = time.monotonic()
        if piece.finish_reason is not None:
            self._model.queue.release(time.monotonic() - self.start_time)
        self._pieces.put_nowait((index, piece))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield (choice, piece) pairs as they arrive. Raises APIError when generation fails."""
        while self._num_unfinished:
            index, piece = await self._pieces.get()
            if piece.finish_reason == "cancelled":
                raise stopping_error()
            if piece.finish_reason == "error":
                raise APIError("generation_failed", "Generation failed.")
            self._num_unfinished -= piece.finish_reason is not None
            yield index, piece

    async def collect(self) -> list[FinishedAnswer]:
        """Wait for all choices and return them. Raises APIError as `pieces` does."""
        finished = [FinishedAnswer() for _ in self._completions]
        async for index, piece in self.pieces():
            finished[index].text += piece.text
            finished[index].prompt_logprobs += piece.prompt_logprobs
            finished[index].logprobs += piece.logprobs
            finished[index].finish_reason = piece.finish_reason
        return finished

    def cancel(self) -> None:
        """Stop generating unfinished answers; their slots are free at the next step."""
        for completion in self._completions:
            completion.cancel()

    def prompt(self, index: int) -> Sequence[int]:
        """Return the prompt ids of a choice."""
        return self._completions[index].request.prompt

    def usage(self) -> Usage:
        """Count the tokens so far; a prompt counts once, whatever the number of choices."""
        first_choices = self._completions[:: self._choices]
        prompt = sum(completion.prompt_tokens for completion in first_choices)
        cached = sum(completion.cached_tokens for completion in first_choices)
        generated = sum(completion.completion_tokens for completion in self._completions)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=generated,
            total_tokens=prompt + generated,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )


def stopping_error() -> APIError:
    """Return the error for requests during shutdown."""
    return APIError("stopping", "The service is shutting down.")
