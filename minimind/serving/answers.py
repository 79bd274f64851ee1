"""Between the event loop and the engines' threads: what a request asks for, and its answers."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from minimind.errors import MinimindError, UsageError
from minimind.inference.conversation import fit_chat
from minimind.inference.engine import Completion, Piece, Request, TokenLogprob
from minimind.inference.json_object import LEAST_TOKENS, JsonConstraint
from minimind.inference.sampling import Sampling
from minimind.serving.errors import APIError
from minimind.serving.models import ServedModel
from minimind.serving.schema import (
    CachedTokens,
    ChatRequest,
    CompletionRequest,
    Usage,
)
from minimind.tokenizer.chat import encode_chat

_SEEDS = 2**32
_COMPLETION_TOKENS = 16  # where nothing is said, as at OpenAI


@dataclass
class Answered:
    """A whole answer; tokens where log-probabilities were asked for, reason of its end."""

    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    reason: Any = None


@dataclass(frozen=True)
class Asked:
    """What the engine is to do, in the order of the choices."""

    requests: list[Request]
    left_out: int = 0  # messages that the model does not see


def ask_chat(request: ChatRequest, model: ServedModel) -> Asked:
    """One request for each choice. Raises APIError."""
    if request.top_logprobs and not request.logprobs:
        raise APIError(
            400,
            "'top_logprobs' needs 'logprobs' to be true.",
            param="top_logprobs",
            code="invalid_value",
        )
    most, also = request.max_completion_tokens, request.max_tokens
    if most is not None and also is not None and most != also:
        raise APIError(
            400,
            "'max_tokens' and 'max_completion_tokens' differ; give one of them.",
            param="max_tokens",
            code="invalid_value",
        )
    most = also if most is None else most
    prompt, left_out = _chat_prompt(request, model, most)
    requests = _requests(
        request,
        model,
        [prompt],
        most_tokens=most,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    return Asked(requests, left_out)


def _chat_prompt(
    request: ChatRequest, model: ServedModel, most_tokens: int | None
) -> tuple[list[int], int]:
    """The prompt, and how many messages had to be left out of it."""
    roles = {"developer": "system"}
    messages = [{"role": roles.get(m.role, m.role), "content": m.text} for m in request.messages]
    if request.truncation != "auto" or messages[-1]["role"] != "user":
        _refuse_what_cannot_fit([m["content"] for m in messages], model, "messages")
        try:
            return encode_chat(model.tokenizer, messages, add_generation_prompt=True)[0], 0
        except (ValueError, MinimindError) as error:  # its template takes no such conversation
            raise APIError(400, f"{error}.", param="messages", code="invalid_value") from None
    _refuse_what_cannot_fit([messages[-1]["content"]], model, "messages")
    quarter = model.context // 4
    room = quarter if most_tokens in (None, -1) else min(most_tokens, quarter)
    try:
        return fit_chat(model.tokenizer, messages, model.context - room)
    except UsageError as error:
        raise APIError(400, f"{error}.", param="messages", code="context_length_exceeded") from None


def ask_completion(request: CompletionRequest, model: ServedModel) -> Asked:
    """For each prompt, one request for each choice. Raises APIError."""
    if request.echo and request.logprobs is not None:
        raise APIError(
            400,
            "'echo' with 'logprobs' is not offered by this service.",
            param="echo",
            code="unsupported_parameter",
        )
    for prompt in as_prompts(request):
        _refuse_what_cannot_fit([prompt] if isinstance(prompt, str) else [], model, "prompt")
    prompts = [_prompt_ids(prompt, model) for prompt in as_prompts(request)]
    most = _COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    requests = _requests(request, model, prompts, most_tokens=most, logprobs=request.logprobs)
    return Asked(requests)


def as_prompts(request: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a request, whichever of four ways it gave them in."""
    prompt: Any = request.prompt
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def _prompt_ids(prompt: str | list[int], model: ServedModel) -> list[int]:
    if isinstance(prompt, str):
        # After nothing comes what begins a document.
        ids = model.tokenizer.text_start + model.tokenizer.encode(prompt)
        return ids or [model.tokenizer.end_of_text]
    most = model.tokenizer.vocab_size
    if any(not 0 <= token < most for token in prompt):
        raise APIError(
            400,
            f"A token id of the prompt is not from 0 to {most - 1:,}.",
            param="prompt",
            code="invalid_value",
        )
    return prompt


def _refuse_what_cannot_fit(texts: Sequence[str], model: ServedModel, param: str) -> None:
    """Spare the tokenizer a text of which each token would have to be longer than the longest."""
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    least = size // max(model.tokenizer.token_bytes)
    if least >= model.context:
        raise _too_long(model, f"at least {least:,}", param)


def _too_long(model: ServedModel, tokens: str, param: str) -> APIError:
    return APIError(
        400,
        f"This model's maximum context length is {model.context:,} tokens and the prompt has "
        f"{tokens}, which leaves no room for an answer. Shorten it.",
        param=param,
        code="context_length_exceeded",
    )


def _requests(
    request: ChatRequest | CompletionRequest,
    model: ServedModel,
    prompts: Sequence[list[int]],
    *,
    most_tokens: int | None,
    logprobs: int | None,
) -> list[Request]:
    for prompt in prompts:
        if len(prompt) >= model.context:
            param = "messages" if isinstance(request, ChatRequest) else "prompt"
            raise _too_long(model, f"{len(prompt):,}", param)
    sampling = _sampling(request, model)
    most = None if most_tokens == -1 else most_tokens
    number = range(len(prompts) * request.choices)
    return [
        Request(
            prompt=(prompt := prompts[i // request.choices]),
            sampling=sampling,
            max_new_tokens=most,
            stop=request.stops,
            stop_ids=model.stop_ids,
            seed=None if request.seed is None else (request.seed + i) % _SEEDS,
            logprobs=logprobs,
            constraint=_constraint(request, model, len(prompt), most),
        )
        for i in number
    ]


def _constraint(
    request: ChatRequest | CompletionRequest, model: ServedModel, read: int, most: int | None
) -> JsonConstraint | None:
    if not isinstance(request, ChatRequest) or request.response_format is None:
        return None
    if request.response_format.type == "text":
        return None
    room = model.context - read
    tokens = room if most is None else min(most, room)
    if tokens < LEAST_TOKENS:
        raise APIError(
            400,
            f"A JSON object takes at least {LEAST_TOKENS} tokens, and there is room for {tokens}.",
            param="response_format",
            code="invalid_value",
        )
    return JsonConstraint(model.json, tokens)


def _sampling(request: ChatRequest | CompletionRequest, model: ServedModel) -> Sampling:
    given: dict[str, Any] = {
        "temperature": request.temperature,
        # A nucleus of nothing is the likeliest token alone.
        "top_p": None if request.top_p is None else max(request.top_p, 1e-9),
        "top_k": request.top_k,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "logit_bias": _logit_bias(request, model),
    }
    return Sampling(**{name: value for name, value in given.items() if value is not None})


def _logit_bias(
    request: ChatRequest | CompletionRequest, model: ServedModel
) -> dict[int, float] | None:
    bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
    if any(token >= model.tokenizer.vocab_size for token in bias):
        raise APIError(
            400,
            f"A token id of 'logit_bias' is not below {model.tokenizer.vocab_size:,}.",
            param="logit_bias",
            code="invalid_value",
        )
    return bias or None


class Answers:
    """The answers to one request, while the engine writes them. Made in the event loop."""

    def __init__(self, model: ServedModel, requests: Sequence[Request], choices: int) -> None:
        """`choices` requests for each prompt. Raises APIError when the queue is full."""
        model.queue.take(len(requests))
        self.began = time.monotonic()
        self.first_token_at: float | None = None
        self._model = model
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._choices = choices
        self._open = len(requests)
        self._completions: list[Completion] = []
        for index, request in enumerate(requests):
            self._completions.append(model.engine.submit(request, self._deliver(index)))

    def _deliver(self, index: int) -> Any:
        def deliver(piece: Piece) -> None:  # in the engine's thread
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
                self._loop.call_soon_threadsafe(self._take, index, piece)

        return deliver

    def _take(self, index: int, piece: Piece) -> None:
        if self.first_token_at is None and piece.token_ids:
            self.first_token_at = time.monotonic()
        if piece.finish_reason is not None:
            self._model.queue.give_back(time.monotonic() - self.began)
        self._pieces.put_nowait((index, piece))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(choice, piece) as they come. Raises APIError when the engine cannot go on."""
        while self._open:
            index, piece = await self._pieces.get()
            if piece.finish_reason == "cancelled":
                raise stopping()
            if piece.finish_reason == "error":
                raise APIError(
                    500, "The model could not go on with this request.", code="generation_failed"
                )
            self._open -= piece.finish_reason is not None
            yield index, piece

    async def gathered(self) -> list[Answered]:
        """Every choice, when the last of them is finished. Raises APIError as `pieces` does."""
        answered = [Answered() for _ in self._completions]
        async for index, piece in self.pieces():
            answered[index].text += piece.text
            answered[index].tokens += piece.logprobs
            answered[index].reason = piece.finish_reason
        return answered

    def cancel(self) -> None:
        """Stop writing what is still open; the slots are free at the next token."""
        for completion in self._completions:
            completion.cancel()

    def usage(self) -> Usage:
        """What was read and written so far; a prompt counts once, however many its choices."""
        firsts = self._completions[:: self._choices]
        prompt = sum(completion.prompt_tokens for completion in firsts)
        cached = sum(completion.cached_tokens for completion in firsts)
        written = sum(completion.completion_tokens for completion in self._completions)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=written,
            total_tokens=prompt + written,
            prompt_tokens_details=CachedTokens(cached_tokens=cached),
        )


def stopping() -> APIError:
    """What a client is told while the service ends."""
    return APIError(503, "The service is stopping.", code="stopping")
