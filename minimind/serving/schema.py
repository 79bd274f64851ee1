"""What the service takes and gives, in the words of OpenAI's API reference (platform.openai.com).

Beyond OpenAI's: `top_k`, `min_p`, `repetition_penalty`, -1 for "as long as the context allows",
`truncation` (which OpenAI has elsewhere), and `max_model_len` of a model. A field that is not here
is refused, never passed over, unless its value asks for nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MOST_CHOICES = 16
_MOST_STOPS = 4
_MOST_BIASES = 1024
_MOST_KEYS = 256  # of one object

# Parameters of OpenAI's that are known here and not offered, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "function_call": (None, "none"),
    "functions": (None, []),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "parallel_tool_calls": (None,),
    "prediction": (None,),
    "prompt_cache_key": (None,),
    "prompt_cache_retention": (None,),
    "reasoning_effort": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}


class _Strict(BaseModel):
    # Strict: a number in quotes is a mistake of the sender's, not a number.
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_many_keys(cls, value: Any) -> Any:
        return _few(value, _MOST_KEYS)


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _few(value: Any, most: int) -> Any:
    """Raise for an object of too many keys: each wrong one would be a complaint of its own, and a
    hundred thousand complaints would keep everybody waiting. Lists stop at the first (fail_fast).
    """
    if isinstance(value, dict) and len(value) > most:
        raise PydanticCustomError("too_many_keys", f"it has more than {most:,} keys")
    return value


Tokens = Literal[-1] | Annotated[int, Field(ge=1, le=2**31 - 1)]
Stop = (
    Annotated[str, Field(min_length=1, max_length=1000)]
    | Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1000)]],
        Field(fail_fast=True, max_length=_MOST_STOPS),
    ]
)
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=_MOST_BIASES),
    BeforeValidator(lambda value: _few(value, _MOST_BIASES)),
]


def _only_text(kind: Any) -> Any:
    if isinstance(kind, str) and kind != "text":
        raise PydanticCustomError("not_text", "only text parts are offered")
    return kind


def _text_or_parts(content: Any) -> Any:
    if not isinstance(content, str | list):
        raise PydanticCustomError("not_content", "it must be a string or a list of text parts")
    return content


class TextPart(_Strict):
    """A piece of a message's text."""

    text: str
    # After `text`, which other kinds do not have: of two complaints the last one is told.
    type: Annotated[Literal["text"], BeforeValidator(_only_text)]


class Message(_Strict):
    """One message of a conversation; `developer` means `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str | Annotated[list[TextPart], Field(fail_fast=True, min_length=1)],
        BeforeValidator(_text_or_parts),
    ]

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, value: Any) -> Any:
        # Clients send an answer back as they got it.
        return _without(value, _MESSAGE_EXTRAS)

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


_MESSAGE_EXTRAS: dict[str, tuple[Any, ...]] = dict.fromkeys(
    ("name", "refusal", "tool_calls", "function_call", "audio", "annotations"), (None, [])
)


class StreamOptions(_Strict):
    """What a stream tells besides its text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ResponseFormat(_Strict):
    """Free text, or an answer that is one JSON object."""

    type: Literal["text", "json_object"]


class _Request(_Strict):
    """What both kinds of completion have in common; null means the default."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | None = None
    user: str | None = Field(None, description="Accepted, and not kept.")
    safety_identifier: str | None = Field(None, description="Accepted, and not kept.")

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, value: Any) -> Any:
        return _without(value, UNSUPPORTED)

    @property
    def choices(self) -> int:
        """How many answers are wanted."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with the figures of its use."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=2048)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        None,
        description="auto: the oldest turns of a conversation that is too long are left out, and "
        "the header minimind-left-out says how many messages.",
    )


Prompt = (
    str
    | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MOST_CHOICES)]
    | Annotated[list[int], Field(fail_fast=True, min_length=1)]
    | Annotated[
        list[Annotated[list[int], Field(fail_fast=True, min_length=1)]],
        Field(fail_fast=True, min_length=1, max_length=MOST_CHOICES),
    ]
)


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: Tokens | None = Field(None, description="16 unless given.")
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None


def _without(value: Any, asking_nothing: dict[str, tuple[Any, ...]]) -> Any:
    """The object as it is but for keys whose values ask for nothing."""
    if not isinstance(value, dict):
        return value
    left_out = {
        key
        for key in asking_nothing.keys() & value.keys()
        # `is` the same type too: in Python False == 0 and 1 == True.
        if any(
            value[key] == nothing and type(value[key]) is type(nothing)
            for nothing in asking_nothing[key]
        )
    }
    return {key: value[key] for key in value if key not in left_out} if left_out else value


# Answers


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
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
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
