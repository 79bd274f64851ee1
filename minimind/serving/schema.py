"""What the service answers, in the words of OpenAI's API reference (platform.openai.com)."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CachedTokens(_Answer):
    """Of the prompt's tokens, those that had been read for an earlier request."""

    cached_tokens: int = 0


class Usage(_Answer):
    """What a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TopLogprob(_Answer):
    """A token that might have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token that was chosen, and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Answer):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


FinishReason = Literal["stop", "length"]


class AnswerMessage(_Answer):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(_Answer):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(_Answer):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(_Answer):
    """Log-probabilities in the older shape: one list for each field."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(
        description="null for the first token of an echoed prompt, which nothing precedes."
    )
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Answer):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason


class Completion(_Answer):
    """The continuations of one or several texts."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class Model(_Answer):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "minimind"
    max_model_len: int = Field(description="Longest context, in tokens.")


class ModelList(_Answer):
    """All models that are served."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(_Answer):
    """Whether the service takes requests; reason: the error after which it takes none."""

    status: Literal["ok", "stopping", "failed"]
    reason: str | None = None


class ErrorBody(_Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(_Answer):
    """Every error, in OpenAI's shape."""

    error: ErrorBody
