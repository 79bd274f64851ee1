"""Between the event loop and the engines' threads: what a request asks for, and its answers."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from minimind.errors import MinimindError, UsageError
from minimind.inference.grammar import ANY_OBJECT, Grammar
from minimind.inference.requests import Completion, Piece, Request, TokenLogprob
from minimind.inference.sampling import Sampling
from minimind.inference.truncation import truncate_chat
from minimind.serving.errors import APIError
from minimind.serving.models import ServedModel
from minimind.serving.requests import (
    COMPLETION_TOKENS,
    ChatRequest,
    CompletionRequest,
    ResponseFormat,
)
from minimind.serving.schema import CachedTokens, Usage
from minimind.tokenizer.chat import encode_chat

_SEEDS = 2**32


@dataclass
class Answered:
    """A whole answer; log-probabilities where they were asked for, and the reason of its end."""

    text: str = ""
    prompt_tokens: list[TokenLogprob] = field(default_factory=list)
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
    most = model.defaults.max_new_tokens if most is None else most
    prompt, left_out = _chat_prompt(request, model, most)
    requests = _requests(
        request,
        model,
        [prompt],
        most_tokens=most,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        grammar=_grammar(request, model),
    )
    return Asked(requests, left_out)


def _chat_prompt(
    request: ChatRequest, model: ServedModel, most_tokens: int | None
) -> tuple[list[int], int]:
    """The prompt, and how many messages had to be left out of it."""
    roles = {"developer": "system"}
    messages = [{"role": roles.get(m.role, m.role), "content": m.text} for m in request.messages]
    is_cut = request.truncation == "auto" and messages[-1]["role"] == "user"
    read = messages[-1:] if is_cut else messages
    _refuse_what_cannot_fit([m["content"] for m in read], model, "messages")
    try:
        if not is_cut:
            return encode_chat(model.tokenizer, messages, add_generation_prompt=True)[0], 0
        quarter = model.context // 4
        room = quarter if most_tokens in (None, -1) else min(most_tokens, quarter)
        return truncate_chat(model.tokenizer, messages, model.context - room)
    except UsageError as error:
        raise APIError(400, f"{error}.", param="messages", code="context_length_exceeded") from None
    except (ValueError, MinimindError) as error:  # its template refuses such a conversation
        raise APIError(400, f"{error}.", param="messages", code="invalid_value") from None


def _grammar(request: ChatRequest, model: ServedModel) -> Grammar | None:
    wanted = request.response_format or ResponseFormat(type="text")
    if wanted.type == "text":
        return None
    if request.stops:
        raise APIError(
            400,
            "'stop' cannot be combined with a 'response_format' of JSON, which ends where the JSON "
            "is complete. Leave one of them out.",
            param="stop",
            code="invalid_value",
        )
    described = wanted.json_schema
    try:
        return model.grammars.compile((described and described.definition) or ANY_OBJECT)
    except UsageError as error:
        name = described.name if described else ""
        raise APIError(
            400,
            f"Invalid schema for response_format '{name}': {error}.",
            param="response_format",
            code="invalid_value",
        ) from None


def ask_completion(request: CompletionRequest, model: ServedModel) -> Asked:
    """For each prompt, one request for each choice. Raises APIError."""
    for prompt in as_prompts(request):
        _refuse_what_cannot_fit([prompt] if isinstance(prompt, str) else [], model, "prompt")
    prompts = [_prompt_ids(prompt, model) for prompt in as_prompts(request)]
    requests = _requests(
        request,
        model,
        prompts,
        most_tokens=COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
    )
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
    prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
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
            prompt=prompts[i // request.choices],
            sampling=sampling,
            max_new_tokens=most,
            stop=request.stops,
            stop_ids=model.stop_ids,
            seed=None if request.seed is None else (request.seed + i) % _SEEDS,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            constraint=None if grammar is None else grammar.start(),
        )
        for i in number
    ]


def _sampling(request: ChatRequest | CompletionRequest, model: ServedModel) -> Sampling:
    settings = {
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
    return model.defaults.sampling_with(settings)


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
            answered[index].prompt_tokens += piece.prompt_logprobs
            answered[index].tokens += piece.logprobs
            answered[index].reason = piece.finish_reason
        return answered

    def cancel(self) -> None:
        """Stop writing what is still open; the slots are free at the next token."""
        for completion in self._completions:
            completion.cancel()

    def prompt(self, index: int) -> Sequence[int]:
        """The tokens that a choice continues."""
        return self._completions[index].request.prompt

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
