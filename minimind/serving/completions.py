"""/v1/completions: the older way, which goes on with texts."""

from collections.abc import AsyncIterator
from typing import Any

from minimind.serving.answers import Answers, as_prompts
from minimind.serving.logprobs import TextOffsets, completion_logprobs
from minimind.serving.models import ServedModel
from minimind.serving.schema import Completion, CompletionChoice, CompletionRequest


async def whole(
    head: dict[str, Any], request: CompletionRequest, model: ServedModel, answers: Answers
) -> Completion:
    """All choices of all prompts, when the last of them is finished."""
    choices = [
        CompletionChoice(
            index=index,
            text=echo + one.text,
            logprobs=None
            if request.logprobs is None
            else completion_logprobs(model.tokenizer, one.tokens, TextOffsets(model.tokenizer)),
            finish_reason=one.reason,
        )
        for index, (echo, one) in enumerate(
            zip(_echoes(request, model), await answers.gathered(), strict=True)
        )
    ]
    return Completion(**head, choices=choices, usage=answers.usage())


async def events(
    head: dict[str, Any], request: CompletionRequest, model: ServedModel, answers: Answers
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream: the text, the reason of the end with its last piece, the usage."""
    head = head | {"object": "text_completion"}
    more: dict[str, Any] = {"usage": None} if request.wants_usage else {}

    def chunk(index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return head | {"choices": [choice]} | more

    echoes = _echoes(request, model)
    for index, echo in enumerate(echoes):
        if echo:
            yield chunk(index, echo, None, None)
    offsets = [TextOffsets(model.tokenizer) for _ in echoes]
    async for index, piece in answers.pieces():
        logprobs = None
        if request.logprobs is not None and piece.logprobs:
            found = completion_logprobs(model.tokenizer, piece.logprobs, offsets[index])
            logprobs = found.model_dump()
        if piece.text or logprobs or piece.finish_reason:
            yield chunk(index, piece.text, logprobs, piece.finish_reason)
    if request.wants_usage:
        yield head | {"choices": [], "usage": answers.usage().model_dump()}


def _echoes(request: CompletionRequest, model: ServedModel) -> list[str]:
    """What each choice begins with: its prompt, where that is asked for."""
    prompts = as_prompts(request) if request.echo else [""] * len(as_prompts(request))
    texts = [p if isinstance(p, str) else model.tokenizer.decode(p) for p in prompts]
    return [text for text in texts for _ in range(request.choices)]
