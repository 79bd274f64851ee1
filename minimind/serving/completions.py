"""Responses of /v1/completions (OpenAI's legacy endpoint), complete or as a stream of chunks."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from minimind.serving.answers import Answers
from minimind.serving.engine_requests import prompts_of
from minimind.serving.logprobs import TextOffsets, completion_logprobs
from minimind.serving.models import ServedModel
from minimind.serving.requests import CompletionRequest
from minimind.serving.schema import Completion, CompletionChoice


async def complete(
    head: dict[str, Any], request: CompletionRequest, model: ServedModel, answers: Answers
) -> Completion:
    """Return the completion when all choices of all prompts are finished."""
    finished = await answers.collect()
    echoes = _echoes(request, model, answers)
    choices = []
    for index, (echo, answer) in enumerate(zip(echoes, finished, strict=True)):
        logprobs = None
        if request.logprobs is not None:
            tokens = [*answer.prompt_logprobs, *answer.logprobs]
            logprobs = completion_logprobs(model.tokenizer, tokens, echo.offsets, echo.first_token)
        choices.append(
            CompletionChoice(
                index=index,
                text=echo.text + answer.text,
                logprobs=logprobs,
                finish_reason=answer.finish_reason,
            )
        )
    return Completion(**head, choices=choices, usage=answers.usage())


async def stream(
    head: dict[str, Any], request: CompletionRequest, model: ServedModel, answers: Answers
) -> AsyncIterator[dict[str, Any]]:
    """Yield chunks: the text, the finish reason with its last piece, then usage if requested."""
    head = head | {"object": "text_completion"}
    usage: dict[str, Any] = {"usage": None} if request.include_usage else {}

    def chunk(index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        choice = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return head | {"choices": [choice]} | usage

    echoes = _echoes(request, model, answers)
    to_echo = {index for index, echo in enumerate(echoes) if echo.first_token is not None}
    if request.logprobs is None:  # otherwise the echo is sent with its log-probabilities
        for index in sorted(to_echo):
            yield chunk(index, echoes[index].text, None, None)
        to_echo = set()
    async for index, piece in answers.pieces():
        echo = echoes[index]
        if index in to_echo:
            to_echo.remove(index)
            echoed = completion_logprobs(
                model.tokenizer, piece.prompt_logprobs, echo.offsets, echo.first_token
            )
            yield chunk(index, echo.text, echoed.model_dump(), None)
        logprobs = None
        if request.logprobs is not None and piece.logprobs:
            generated = completion_logprobs(model.tokenizer, piece.logprobs, echo.offsets)
            logprobs = generated.model_dump()
        if piece.text or logprobs or piece.finish_reason:
            yield chunk(index, piece.text, logprobs, piece.finish_reason)
    if request.include_usage:
        yield head | {"choices": [], "usage": answers.usage().model_dump()}


class _Echo:
    """The echoed prompt of a choice.

    text: "" if no echo is requested. first_token: the first token of the echoed prompt, which has
    no log-probability. offsets: character offsets of the choice's tokens.
    """

    def __init__(
        self, prompt: str | list[int] | None, ids: Sequence[int], model: ServedModel
    ) -> None:
        tokenizer = model.tokenizer
        self.text, hidden = "", 0
        self.first_token: int | None = None
        if prompt is not None:
            decoded = tokenizer.decode(ids, skip_special_tokens=isinstance(prompt, str))
            self.text = prompt if isinstance(prompt, str) else decoded
            self.first_token, hidden = ids[0], max(len(decoded) - len(self.text), 0)
        self.offsets = TextOffsets(tokenizer, hidden)


def _echoes(request: CompletionRequest, model: ServedModel, answers: Answers) -> list[_Echo]:
    prompts = [prompt for prompt in prompts_of(request) for _ in range(request.num_choices)]
    return [
        _Echo(prompt if request.echo else None, answers.prompt(index), model)
        for index, prompt in enumerate(prompts)
    ]
