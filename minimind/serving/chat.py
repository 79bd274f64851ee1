"""Responses of /v1/chat/completions, complete or as a stream of chunks."""

from collections.abc import AsyncIterator
from typing import Any

from minimind.serving.answers import Answers
from minimind.serving.logprobs import chat_logprobs
from minimind.serving.models import ServedModel
from minimind.serving.requests import ChatRequest
from minimind.serving.schema import ChatChoice, ChatCompletion, ResponseMessage


async def complete(
    head: dict[str, Any], request: ChatRequest, model: ServedModel, answers: Answers
) -> ChatCompletion:
    """Return the completion when all choices are finished.

    head: the fields that all objects of a response share (id, created, model, fingerprint).
    """
    choices = [
        ChatChoice(
            index=index,
            message=ResponseMessage(content=answer.text),
            logprobs=chat_logprobs(model.tokenizer, answer.logprobs) if request.logprobs else None,
            finish_reason=answer.finish_reason,
        )
        for index, answer in enumerate(await answers.collect())
    ]
    return ChatCompletion(**head, choices=choices, usage=answers.usage())


async def stream(
    head: dict[str, Any], request: ChatRequest, model: ServedModel, answers: Answers
) -> AsyncIterator[dict[str, Any]]:
    """Yield chunks: the role, the text, the finish reason, then the usage if requested."""
    head = head | {"object": "chat.completion.chunk"}
    usage: dict[str, Any] = {"usage": None} if request.include_usage else {}

    def chunk(
        index: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return head | {"choices": [choice]} | usage

    for index in range(request.num_choices):
        yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
    async for index, piece in answers.pieces():
        logprobs = None
        if request.logprobs and piece.logprobs:
            logprobs = chat_logprobs(model.tokenizer, piece.logprobs).model_dump()
        if piece.text or logprobs:
            yield chunk(index, {"content": piece.text}, logprobs)
        if piece.finish_reason is not None:
            yield chunk(index, {}, finish_reason=piece.finish_reason)
    if request.include_usage:
        yield head | {"choices": [], "usage": answers.usage().model_dump()}
