"""Response bodies, named as in OpenAI's API reference (platform.openai.com)."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from minimind.serving.differences import EXTENSION, differs


class _Response(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PromptTokensDetails(_Response):
    """Breakdown of the prompt tokens."""

    cached_tokens: int = Field(0, description="Prompt tokens taken from the prefix cache.")


class Usage(_Response):
    """Token counts of a request."""

    prompt_tokens: int = Field(
        description="Tokens of the prompts; a prompt counts once, whatever `n` is."
    )
    completion_tokens: int = Field(description="Generated tokens of all choices.")
    total_tokens: int = Field(description="Sum of prompt and completion tokens.")
    prompt_tokens_details: PromptTokensDetails = Field(
        description="Breakdown of the prompt tokens.",
        json_schema_extra=differs("Only `cached_tokens`; there is no `completion_tokens_details`."),
    )


class TopLogprob(_Response):
    """A candidate token with its log-probability."""

    token: str = Field(description="Text of the token; incomplete characters appear as U+FFFD.")
    logprob: float = Field(description="Natural logarithm of the probability; at least -9999.")
    bytes: list[int] = Field(description="UTF-8 bytes of the token.")


class TokenLogprob(TopLogprob):
    """The sampled token with its log-probability and the most likely alternatives."""

    top_logprobs: list[TopLogprob] = Field(
        description="The most likely tokens at this position, as many as `top_logprobs` requests."
    )


class ChatLogprobs(_Response):
    """Log-probabilities of the tokens of a message."""

    content: list[TokenLogprob] = Field(description="One entry per token of the message.")
    refusal: None = Field(
        None, description="Always null.", json_schema_extra=differs("Always null.")
    )


FinishReason = Literal["stop", "length"]
_FINISH_REASON = (
    "`stop`: end of the answer or a stop string; `length`: token limit or end of the context."
)
_ONLY_TWO_REASONS = differs("Never `tool_calls` or `content_filter`.")


class ResponseMessage(_Response):
    """The generated message."""

    role: Literal["assistant"] = Field("assistant", description="Always `assistant`.")
    content: str = Field(description="Text of the message.")
    refusal: None = Field(
        None,
        description="Always null.",
        json_schema_extra=differs("Always null; there are no `tool_calls` or `annotations`."),
    )


class ChatChoice(_Response):
    """One of the `n` generated messages."""

    index: int = Field(description="Index of the choice, from 0.")
    message: ResponseMessage = Field(description="The generated message.")
    logprobs: ChatLogprobs | None = Field(
        None, description="Log-probabilities if requested, else null."
    )
    finish_reason: FinishReason = Field(
        description=_FINISH_REASON, json_schema_extra=_ONLY_TWO_REASONS
    )


_ID = Field(description="Unique ID of the completion.")
_CREATED = Field(description="Unix time of the request in seconds.")
_MODEL = Field(description="Name of the model.")
_FINGERPRINT = Field(
    description="Fingerprint of weights, minimind version, device, dtype and context settings."
)
_USAGE = Field(description="Token counts of the request.")


class ChatCompletion(_Response):
    """A chat completion."""

    id: str = _ID
    object: Literal["chat.completion"] = Field(
        "chat.completion", description="Type of the object; `chat.completion.chunk` in a stream."
    )
    created: int = _CREATED
    model: str = _MODEL
    system_fingerprint: str = _FINGERPRINT
    choices: list[ChatChoice] = Field(description="The `n` generated messages.")
    usage: Usage = _USAGE


class CompletionLogprobs(_Response):
    """Log-probabilities in the format of the legacy endpoint: parallel lists, one per field."""

    tokens: list[str] = Field(
        description="Text of each token; incomplete characters as `bytes:\\xe4\\xbd`."
    )
    token_logprobs: list[float | None] = Field(
        description="Log-probability of each token; null for the first token of an echoed prompt."
    )
    top_logprobs: list[dict[str, float] | None] = Field(
        description="The most likely tokens at each position, including the sampled one."
    )
    text_offset: list[int] = Field(description="Character offset of each token in `text`.")


class CompletionChoice(_Response):
    """One generated continuation."""

    index: int = Field(description="Index of the choice: `n` choices per prompt, in order.")
    text: str = Field(description="The continuation, after the prompt if `echo` is set.")
    logprobs: CompletionLogprobs | None = Field(
        None, description="Log-probabilities if requested, else null."
    )
    finish_reason: FinishReason = Field(
        description=_FINISH_REASON, json_schema_extra=_ONLY_TWO_REASONS
    )


class Completion(_Response):
    """A text completion."""

    id: str = _ID
    object: Literal["text_completion"] = Field(
        "text_completion", description="Type of the object, in a stream too."
    )
    created: int = _CREATED
    model: str = _MODEL
    system_fingerprint: str = _FINGERPRINT
    choices: list[CompletionChoice] = Field(description="`n` continuations per prompt.")
    usage: Usage = _USAGE


class Model(_Response):
    """A served model."""

    id: str = Field(description="Name of the model, to be sent as `model`.")
    object: Literal["model"] = Field("model", description="Type of the object.")
    created: int = Field(description="Unix time of the weight files in seconds.")
    owned_by: str = Field("minimind", description="Always `minimind`.")
    max_model_len: int = Field(
        description="Context length in tokens, prompt and answer together.",
        json_schema_extra=differs(EXTENSION),
    )


class ModelList(_Response):
    """The served models."""

    object: Literal["list"] = Field("list", description="Type of the object.")
    data: list[Model] = Field(description="The served models.")


class Index(_Response):
    """The endpoints of the service."""

    service: Literal["minimind"] = Field("minimind", description="Name of the software.")
    version: str = Field(description="Version of minimind.")
    docs: str = Field(description="Path of the interactive documentation.")
    endpoints: list[str] = Field(description="Method and path of each endpoint.")


class Health(_Response):
    """Health of the service."""

    status: Literal["ok", "stopping", "failed"] = Field(
        description="`ok` with status 200; `stopping` and `failed` with status 503."
    )
    reason: str | None = Field(
        None, description="The error that stopped an engine; only with `failed`."
    )


class ErrorBody(_Response):
    """Description of an error."""

    message: str = Field(description="What is wrong, for a person to read.")
    type: str = Field(
        description="`invalid_request_error`, `rate_limit_error` (429) or `server_error` (5xx)."
    )
    param: str | None = Field(None, description="The parameter at fault, or null.")
    code: str | None = Field(None, description="Error code for programs.")


class ErrorResponse(_Response):
    """An error in OpenAI's format."""

    error: ErrorBody = Field(description="Description of the error.")
