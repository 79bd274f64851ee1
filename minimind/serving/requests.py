"""Requests that the service accepts, in the words of OpenAI's API reference.

Beyond OpenAI's: `top_k`, `min_p`, `repetition_penalty`, -1 for "as long as the context allows" and
`truncation` (which OpenAI has elsewhere). A parameter that changes answers and is not offered is
refused; hints, which do not change answers, are accepted and described as such.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

MOST_CHOICES = 16
COMPLETION_TOKENS = 16
_MOST_STOPS = 4
_MOST_BIASES = 1024
_MOST_KEYS = 256  # of one object
_LARGEST = 2**31 - 1

# Parameters of OpenAI's that are known here and not offered, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}


class _Strict(BaseModel):
    # Strict: a number in quotes is a mistake of the sender's, not a number.
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_many_keys(cls, value: Any) -> Any:
        return _few(value, _MOST_KEYS)


def _few(value: Any, most: int) -> Any:
    """Raise for an object of too many keys: each wrong one would be a complaint of its own, and a
    hundred thousand complaints would keep everybody waiting. Lists stop at the first (fail_fast).
    """
    if isinstance(value, dict) and len(value) > most:
        raise PydanticCustomError("too_many_keys", f"it has more than {most:,} keys")
    return value


def _tokens(least: int) -> Any:
    """The type of a number of tokens: -1, or from `least` on."""

    def check(value: int) -> int:
        if value != -1 and not least <= value <= _LARGEST:
            raise PydanticCustomError(
                "not_tokens", f"it must be -1 (no limit but the context) or from {least} on"
            )
        return value

    number = {"type": "integer", "minimum": least, "maximum": _LARGEST}
    schema = WithJsonSchema({"anyOf": [{"const": -1, "type": "integer"}, number]})
    return Annotated[int, AfterValidator(check), schema]


def _kinds(kind_of: Callable[[Any], str | None], expected: str) -> Discriminator:
    """Choose one kind of a union by its value, so that errors are about the kind that was meant.

    The tags look like types ("str", "list[str]"): error messages leave these out of paths.
    """
    return Discriminator(
        kind_of, custom_error_type="wrong_kind", custom_error_message=f"it must be {expected}"
    )


def _text_or_list(value: Any) -> str | None:
    return "str" if isinstance(value, str) else "list[]" if isinstance(value, list) else None


def _prompt_kind(value: Any) -> str | None:
    if not isinstance(value, list):
        return "str" if isinstance(value, str) else None
    if value and isinstance(value[0], int):
        return "list[int]"
    return "list[list[int]]" if value and isinstance(value[0], list) else "list[str]"


_StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Stop = Annotated[
    Annotated[_StopText, Tag("str")]
    | Annotated[list[_StopText], Field(fail_fast=True, max_length=_MOST_STOPS), Tag("list[]")],
    _kinds(_text_or_list, "a string or a list of strings"),
]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=_MOST_BIASES),
    BeforeValidator(lambda value: _few(value, _MOST_BIASES)),
]
_Hint = Annotated[dict[str, Any], BeforeValidator(lambda value: _few(value, _MOST_KEYS))]


def _only_text(kind: Any) -> Any:
    if isinstance(kind, str) and kind != "text":
        raise PydanticCustomError("not_text", "only text parts are offered")
    return kind


class TextPart(_Strict):
    """A piece of a message's text."""

    # Before `text`, which other kinds do not have: of two complaints the first one is reported.
    type: Annotated[Literal["text"], BeforeValidator(_only_text)] = Field(
        description="The kind of part; only text is offered."
    )
    text: str = Field(description="The text.")


Content = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[list[TextPart], Field(fail_fast=True, min_length=1), Tag("list[]")],
    _kinds(_text_or_list, "a string or a list of text parts"),
]


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="Who speaks; `developer` means `system`."
    )
    content: Content = Field(description="A string, or a list of text parts, which are joined.")
    name: str | None = Field(
        None, description="Accepted without effect: no chat template shows it. Default: none."
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_noop_fields(cls, value: Any) -> Any:
        # Clients send an answer back as they got it.
        return _without(value, _MESSAGE_EXTRAS)

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


_MESSAGE_EXTRAS: dict[str, tuple[Any, ...]] = dict.fromkeys(
    (
        "annotations",
        "audio",
        "function_call",
        "reasoning",
        "reasoning_content",
        "refusal",
        "tool_calls",
    ),
    (None, [], ""),
)


class StreamOptions(_Strict):
    """Options of a stream."""

    include_usage: bool | None = Field(
        False, description="Send a last chunk with the usage of tokens. null = false."
    )
    include_obfuscation: bool | None = Field(
        False, description="Accepted without effect: chunks are never padded."
    )


class JsonSchema(_Strict):
    """A JSON schema that the answer follows."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] = Field(
        description="A name for the schema; it appears in error messages."
    )
    description: str | None = Field(None, description="Accepted without effect. Default: none.")
    definition: dict[str, Any] | None = Field(
        None,
        alias="schema",
        description="The JSON schema. One with a keyword that cannot be enforced is refused. "
        "Default: any JSON object.",
    )
    strict: bool | None = Field(
        False, description="Accepted without effect: the schema is always enforced."
    )


class ResponseFormat(_Strict):
    """Free text, a JSON object, or JSON that follows a schema.

    Tokens that cannot lead to such JSON are never sampled. Where `max_tokens` cuts it,
    `finish_reason` is `length`. Nesting is limited to 64 levels.
    """

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="`json_schema` needs the field of that name."
    )
    json_schema: JsonSchema | None = Field(
        None, description="For the type `json_schema`. Default: none."
    )

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "json_schema", "'json_schema' and the type 'json_schema' need each other"
            )
        return self


def _setting(least: float, most: float, what: str, default: str) -> Any:
    """A sampling setting for which the model's own files may have a default."""
    return Field(
        None,
        ge=least,
        le=most,
        description=f"{what} Default: what the model's generation_config.json says, or {default}.",
    )


class _Request(_Strict):
    """The parameters that both kinds of completion share; null means the default."""

    model: str = Field(description="The name of a model, as /v1/models lists it.")
    stream: bool | None = Field(False, description="Send the answer as server-sent events.")
    stream_options: StreamOptions | None = Field(
        None, description="Options of a stream; only with `stream`. Default: none."
    )
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = Field(
        1, description="Answers to generate."
    )
    temperature: float | None = _setting(0, 2, "Sampling temperature; 0 is greedy decoding.", "1")
    top_p: float | None = _setting(0, 1, "Nucleus (top-p) sampling threshold.", "1")
    top_k: int | None = _setting(
        0, _LARGEST, "Keep only the k most likely tokens; 0 = all. Not OpenAI's.", "0"
    )
    min_p: float | None = _setting(
        0, 1, "Drop tokens below this fraction of the top token's probability. Not OpenAI's.", "0"
    )
    repetition_penalty: float | None = _setting(
        0.01, 100, "Above 1: penalize tokens of the prompt and the answer. Not OpenAI's.", "1"
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        0, description="Subtracted from the logits of tokens that the answer has."
    )
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        0, description="The same, for each time that the answer has them."
    )
    logit_bias: LogitBias | None = Field(
        None, description="Token id to a number that is added to its logit. Default: none."
    )
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        None, description="Equal seeds give equal answers. Default: a random seed."
    )
    stop: Stop | None = Field(
        None,
        description=f"Up to {_MOST_STOPS} strings that end the answer and are not part of it. Not "
        "with a `response_format` of JSON. Default: none.",
    )
    user: str | None = Field(None, description="Accepted without effect. Default: none.")
    safety_identifier: str | None = Field(
        None, description="Accepted without effect. Default: none."
    )
    metadata: _Hint | None = Field(
        None, description="Accepted without effect: nothing is stored. Default: none."
    )
    store: bool | None = Field(False, description="Accepted without effect: nothing is stored.")
    service_tier: str | None = Field(
        "auto", description="Accepted without effect: there is one tier."
    )
    prompt_cache_key: str | None = Field(
        None, description="Accepted without effect: prefixes are always cached. Default: none."
    )
    prompt_cache_retention: str | None = Field(
        None, description="Accepted without effect. Default: none."
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_noop_fields(cls, value: Any) -> Any:
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
        """Whether a stream ends with its usage of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


_CHAT_TOKENS = (
    "Longest answer, in tokens; -1 = what the context has room for. Default: max_new_tokens of the "
    "model's generation_config.json, or -1."
)


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=2048)] = (
        Field(description="The conversation so far.")
    )
    max_completion_tokens: _tokens(1) | None = Field(None, description=_CHAT_TOKENS)  # type: ignore[valid-type]
    max_tokens: _tokens(1) | None = Field(  # type: ignore[valid-type]
        None, description=f"The older name of `max_completion_tokens`. {_CHAT_TOKENS}"
    )
    logprobs: bool | None = Field(
        False, description="Return the log-probabilities of the answer's tokens."
    )
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        0, description="So many most likely tokens at each place; only with `logprobs`."
    )
    response_format: ResponseFormat | None = Field(
        None, description="The form of the answer. Default: text."
    )
    truncation: Literal["auto", "disabled"] | None = Field(
        "disabled",
        description="auto: the oldest turns of a conversation that is too long are left out, and "
        "the header minimind-left-out says how many messages.",
    )
    parallel_tool_calls: bool | None = Field(
        True, description="Accepted without effect: tools are not offered."
    )


_TokenIds = Annotated[list[int], Field(fail_fast=True, min_length=1)]
Prompt = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[
        list[str],
        Field(fail_fast=True, min_length=1, max_length=MOST_CHOICES),
        Tag("list[str]"),
    ]
    | Annotated[_TokenIds, Tag("list[int]")]
    | Annotated[
        list[_TokenIds],
        Field(fail_fast=True, min_length=1, max_length=MOST_CHOICES),
        Tag("list[list[int]]"),
    ],
    _kinds(_prompt_kind, "a string, a list of strings, or one or several lists of token ids"),
]


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Prompt = Field(
        description=f"A string, a list of token ids, or a list of up to {MOST_CHOICES} of either."
    )
    max_tokens: _tokens(0) | None = Field(  # type: ignore[valid-type]
        COMPLETION_TOKENS,
        description="Longest continuation, in tokens; -1 = what the context has room for.",
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = Field(
        None,
        description="Return log-probabilities, and those of so many most likely tokens. "
        "Default: none.",
    )
    echo: bool | None = Field(
        False, description="Begin with the prompt; with `logprobs`, with those of its tokens too."
    )


def _without(value: Any, noops: dict[str, tuple[Any, ...]]) -> Any:
    """The object without the keys whose values ask for nothing."""
    if not isinstance(value, dict):
        return value
    left_out = {
        key
        for key in noops.keys() & value.keys()
        # `is` the same type too: in Python False == 0 and 1 == True.
        if any(value[key] == noop and type(value[key]) is type(noop) for noop in noops[key])
    }
    return {key: value[key] for key in value if key not in left_out} if left_out else value
