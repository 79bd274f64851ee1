"""/v1/chat/completions: pieces of answers into OpenAI's objects, whole or as a stream."""

from collections.abc import AsyncIterator
from typing import Any

from minimind.serving.answers import Answers
from minimind.serving.logprobs import chat_logprobs
from minimind.serving.models import ServedModel
from minimind.serving.requests import ChatRequest
from minimind.serving.schema import AnswerMessage, ChatChoice, ChatCompletion


async def whole(
    head: dict[str, Any], request: ChatRequest, model: ServedModel, answers: Answers
) -> ChatCompletion:
    """All choices, when the last of them is finished."""
    choices = [
        ChatChoice(
            index=index,
            message=AnswerMessage(content=one.text),
            logprobs=chat_logprobs(model.tokenizer, one.tokens) if request.logprobs else None,
            finish_reason=one.reason,
        )
        for index, one in enumerate(await answers.gathered())
    ]
    return ChatCompletion(**head, choices=choices, usage=answers.usage())


async def events(
    head: dict[str, Any], request: ChatRequest, model: ServedModel, answers: Answers
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream: the role, then the text, the reason of the end, the usage."""
    head = head | {"object": "chat.completion.chunk"}
    more: dict[str, Any] = {"usage": None} if request.wants_usage else {}

    def chunk(
        index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return head | {"choices": [choice]} | more

    for index in range(request.choices):
        yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
    async for index, piece in answers.pieces():
        logprobs = None
        if request.logprobs and piece.logprobs:
            logprobs = chat_logprobs(model.tokenizer, piece.logprobs).model_dump()
        if piece.text or logprobs:
            yield chunk(index, {"content": piece.text}, logprobs)
        if piece.finish_reason is not None:
            yield chunk(index, {}, reason=piece.finish_reason)
    if request.wants_usage:
        yield head | {"choices": [], "usage": answers.usage().model_dump()}
