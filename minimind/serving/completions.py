"""/v1/completions: OpenAI's legacy endpoint, which continues texts."""

from collections.abc import AsyncIterator
from typing import Any

from minimind.serving.answers import Answers, as_prompts
from minimind.serving.logprobs import TextOffsets, completion_logprobs
from minimind.serving.models import ServedModel
from minimind.serving.requests import CompletionRequest
from minimind.serving.schema import Completion, CompletionChoice


async def whole(
    head: dict[str, Any], request: CompletionRequest, model: ServedModel, answers: Answers
) -> Completion:
    """All choices of all prompts, when the last of them is finished."""
    answered = await answers.gathered()
    choices = []
    for index, (echo, one) in enumerate(
        zip(_echoes(request, model, answers), answered, strict=True)
    ):
        logprobs = None
        if request.logprobs is not None:
            tokens = [*one.prompt_tokens, *one.tokens]
            logprobs = completion_logprobs(model.tokenizer, tokens, echo.offsets, echo.first)
        choices.append(
            CompletionChoice(
                index=index,
                text=echo.text + one.text,
                logprobs=logprobs,
                finish_reason=one.reason,
            )
        )
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

    echoes = _echoes(request, model, answers)
    to_echo = {index for index, echo in enumerate(echoes) if echo.first is not None}
    if request.logprobs is None:  # otherwise an echo waits for its log-probabilities
        for index in sorted(to_echo):
            yield chunk(index, echoes[index].text, None, None)
        to_echo = set()
    async for index, piece in answers.pieces():
        echo = echoes[index]
        if index in to_echo:
            to_echo.remove(index)
            found = completion_logprobs(
                model.tokenizer, piece.prompt_logprobs, echo.offsets, echo.first
            )
            yield chunk(index, echo.text, found.model_dump(), None)
        logprobs = None
        if request.logprobs is not None and piece.logprobs:
            found = completion_logprobs(model.tokenizer, piece.logprobs, echo.offsets)
            logprobs = found.model_dump()
        if piece.text or logprobs or piece.finish_reason:
            yield chunk(index, piece.text, logprobs, piece.finish_reason)
    if request.wants_usage:
        yield head | {"choices": [], "usage": answers.usage().model_dump()}


class _Echo:
    """What a choice begins with: its prompt, where that is requested.

    first: the prompt's first token. offsets: of the choice's tokens in its text.
    """

    def __init__(self, prompt: str | list[int] | None, ids: Any, model: ServedModel) -> None:
        tokenizer = model.tokenizer
        self.text, hidden = "", 0
        self.first: int | None = None
        if prompt is not None:
            decoded = tokenizer.decode(ids, skip_special_tokens=isinstance(prompt, str))
            self.text = prompt if isinstance(prompt, str) else decoded
            self.first, hidden = ids[0], max(len(decoded) - len(self.text), 0)
        self.offsets = TextOffsets(tokenizer, hidden)


def _echoes(request: CompletionRequest, model: ServedModel, answers: Answers) -> list[_Echo]:
    prompts = [prompt for prompt in as_prompts(request) for _ in range(request.choices)]
    return [
        _Echo(prompt if request.echo else None, answers.prompt(index), model)
        for index, prompt in enumerate(prompts)
    ]
