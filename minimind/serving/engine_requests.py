"""Convert API requests into requests of the engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minimind.errors import MinimindError, UsageError
from minimind.inference.grammar import ANY_OBJECT, Grammar
from minimind.inference.requests import Request
from minimind.inference.sampling import Sampling
from minimind.inference.truncation import truncate_chat
from minimind.serving.errors import APIError
from minimind.serving.models import ServedModel
from minimind.serving.requests import COMPLETION_TOKENS, ChatRequest, CompletionRequest
from minimind.tokenizer.chat import encode_chat

_NUM_SEEDS = 2**32


@dataclass(frozen=True)
class EngineRequests:
    """Requests for the engine in the order of the choices: `n` per prompt."""

    requests: list[Request]
    left_out: int = 0  # messages dropped by truncation


def prepare_chat(request: ChatRequest, model: ServedModel) -> EngineRequests:
    """Encode a conversation. Raises APIError."""
    if request.top_logprobs and not request.logprobs:
        raise APIError(
            "invalid_value", "'top_logprobs' requires 'logprobs' to be true.", param="top_logprobs"
        )
    max_tokens, older_name = request.max_completion_tokens, request.max_tokens
    if max_tokens is not None and older_name is not None and max_tokens != older_name:
        raise APIError(
            "invalid_value",
            "'max_tokens' and 'max_completion_tokens' differ. Send one of them.",
            param="max_tokens",
        )
    max_tokens = older_name if max_tokens is None else max_tokens
    max_tokens = model.defaults.max_new_tokens if max_tokens is None else max_tokens
    prompt, left_out = _chat_prompt(request, model, max_tokens)
    requests = _engine_requests(
        request,
        model,
        [prompt],
        max_tokens=max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        grammar=_grammar(request, model),
    )
    return EngineRequests(requests, left_out)


def prepare_completion(request: CompletionRequest, model: ServedModel) -> EngineRequests:
    """Encode the prompts of a text completion. Raises APIError."""
    for prompt in prompts_of(request):
        if isinstance(prompt, str):
            _check_size([prompt], model, "prompt")
    requests = _engine_requests(
        request,
        model,
        [_prompt_ids(prompt, model) for prompt in prompts_of(request)],
        max_tokens=COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
    )
    return EngineRequests(requests)


def prompts_of(request: CompletionRequest) -> list[str | list[int]]:
    """Return the prompts of a request as a list."""
    prompt: Any = request.prompt
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def _chat_prompt(
    request: ChatRequest, model: ServedModel, max_tokens: int | None
) -> tuple[list[int], int]:
    """Return the prompt ids and the number of messages dropped by truncation."""
    roles = {"developer": "system"}
    messages = [{"role": roles.get(m.role, m.role), "content": m.text} for m in request.messages]
    truncates = request.truncation == "auto" and messages[-1]["role"] == "user"
    required = messages[-1:] if truncates else messages
    _check_size([message["content"] for message in required], model, "messages")
    try:
        if not truncates:
            return encode_chat(model.tokenizer, messages, add_generation_prompt=True)[0], 0
        quarter = model.context // 4
        reserved = quarter if max_tokens in (None, -1) else min(max_tokens, quarter)
        return truncate_chat(model.tokenizer, messages, model.context - reserved)
    except UsageError as error:
        raise APIError("context_length_exceeded", f"{error}.", param="messages") from None
    except (ValueError, MinimindError) as error:  # the chat template rejects the conversation
        raise APIError("invalid_value", f"{error}.", param="messages") from None


def _grammar(request: ChatRequest, model: ServedModel) -> Grammar | None:
    response_format = request.response_format
    if response_format is None or response_format.type == "text":
        return None
    if request.stop_strings:
        raise APIError(
            "invalid_value",
            "'stop' cannot be combined with a JSON 'response_format', which ends where the JSON is "
            "complete. Leave one of them out.",
            param="stop",
        )
    try:
        return model.grammars.compile(request.json_schema or ANY_OBJECT)
    except UsageError as error:
        name = response_format.json_schema.name if response_format.json_schema else ""
        raise APIError(
            "invalid_value",
            f"Invalid schema for response_format '{name}': {error}.",
            param="response_format",
        ) from None


def _prompt_ids(prompt: str | list[int], model: ServedModel) -> list[int]:
    if isinstance(prompt, str):
        ids = model.tokenizer.text_start + model.tokenizer.encode(prompt)
        return ids or [model.tokenizer.end_of_text]  # an empty prompt starts a new document
    vocab_size = model.tokenizer.vocab_size
    if any(not 0 <= token < vocab_size for token in prompt):
        raise APIError(
            "invalid_value",
            f"The prompt has a token id outside 0 to {vocab_size - 1:,}.",
            param="prompt",
        )
    return prompt


def _check_size(texts: Sequence[str], model: ServedModel, param: str) -> None:
    """Reject text that cannot fit even if every token were the longest, without tokenizing it."""
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    min_tokens = size // max(model.tokenizer.token_bytes)
    if min_tokens >= model.context:
        raise _context_exceeded(model, f"at least {min_tokens:,}", param)


def _context_exceeded(model: ServedModel, tokens: str, param: str) -> APIError:
    return APIError(
        "context_length_exceeded",
        f"This model's maximum context length is {model.context:,} tokens and the prompt has "
        f"{tokens}, which leaves no room for an answer. Shorten it.",
        param=param,
    )


def _engine_requests(
    request: ChatRequest | CompletionRequest,
    model: ServedModel,
    prompts: Sequence[list[int]],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
) -> list[Request]:
    for prompt in prompts:
        if len(prompt) >= model.context:
            param = "messages" if isinstance(request, ChatRequest) else "prompt"
            raise _context_exceeded(model, f"{len(prompt):,}", param)
    sampling = _sampling(request, model)
    return [
        Request(
            prompt=prompts[i // request.num_choices],
            sampling=sampling,
            max_new_tokens=None if max_tokens == -1 else max_tokens,
            stop=request.stop_strings,
            stop_ids=model.stop_ids,
            seed=None if request.seed is None else (request.seed + i) % _NUM_SEEDS,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            constraint=None if grammar is None else grammar.start(),
        )
        for i in range(len(prompts) * request.num_choices)
    ]


def _sampling(request: ChatRequest | CompletionRequest, model: ServedModel) -> Sampling:
    settings = {
        "temperature": request.temperature,
        # top_p = 0 means greedy decoding: the nucleus always has at least one token.
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
            "invalid_value",
            f"A token id of 'logit_bias' is not below {model.tokenizer.vocab_size:,}.",
            param="logit_bias",
        )
    return bias or None
