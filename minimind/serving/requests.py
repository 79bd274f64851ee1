"""Request bodies of the two completion endpoints, named as in OpenAI's API reference.

Each field states its difference from OpenAI's API. A parameter that would change the answer and is
not supported is refused (UNSUPPORTED); hints that cannot change it are accepted without effect.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from minimind.serving.differences import EXTENSION, differs, ignored
from minimind.serving.request_types import (
    MAX_CHOICES,
    MAX_INT,
    MAX_STOP_STRINGS,
    LogitBias,
    Metadata,
    Prompt,
    Stop,
    StrictModel,
    string_or_list,
    token_count,
    union_by,
    without_noops,
)

COMPLETION_TOKENS = 16  # OpenAI's default max_tokens of /v1/completions

# OpenAI parameters that are refused, except with these values, which have no effect.
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


def _check_text_part(kind: Any) -> Any:
    if isinstance(kind, str) and kind != "text":
        raise PydanticCustomError("not_text", "only text parts are supported")
    return kind


class TextPart(StrictModel):
    """A text part of a message's content."""

    # Declared before `text`, which other part types lack: the first error is the one reported.
    type: Annotated[Literal["text"], BeforeValidator(_check_text_part)] = Field(
        description="Type of the part.",
        json_schema_extra=differs("Only `text`: no images, audio or files."),
    )
    text: str = Field(description="Text of the part.")


Content = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[list[TextPart], Field(fail_fast=True, min_length=1), Tag("list[]")],
    union_by(string_or_list, "a string or a list of text parts"),
]


class Message(StrictModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="Author of the message; `developer` is treated as `system`.",
        json_schema_extra=differs("No `tool` or `function` messages."),
    )
    content: Content = Field(
        description="Text of the message: a string, or text parts, which are concatenated."
    )
    name: str | None = Field(
        None,
        description="Name of the author. Default: none.",
        json_schema_extra=ignored("No effect: chat templates do not show it."),
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_noop_fields(cls, value: Any) -> Any:
        return without_noops(value, _RESPONSE_FIELDS)

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


# Clients send a received message back unchanged; its empty fields are dropped.
_RESPONSE_FIELDS: dict[str, tuple[Any, ...]] = dict.fromkeys(
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


class StreamOptions(StrictModel):
    """Options of a stream."""

    include_usage: bool | None = Field(
        False, description="Send a last chunk with token counts. null = false."
    )
    include_obfuscation: bool | None = Field(
        False,
        description="Pad chunks with random characters.",
        json_schema_extra=ignored("No effect: chunks are never padded."),
    )


class JsonSchema(StrictModel):
    """A JSON schema that the answer must follow."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] = Field(
        description="Name of the schema, used in error messages."
    )
    description: str | None = Field(
        None,
        description="Description of the schema. Default: none.",
        json_schema_extra=ignored("No effect: the model does not see it."),
    )
    definition: dict[str, Any] | None = Field(
        None,
        alias="schema",
        description="The JSON schema. Default: any JSON object.",
        json_schema_extra=differs(
            "Not limited to OpenAI's strict subset; keywords that cannot be enforced are refused."
        ),
    )
    strict: bool | None = Field(
        False,
        description="Enforce the schema.",
        json_schema_extra=ignored("No effect: the schema is always enforced."),
    )


class ResponseFormat(StrictModel):
    """Output format: free text, any JSON object, or JSON that follows a schema.

    Tokens that would violate the format are masked. If `max_tokens` truncates the JSON,
    `finish_reason` is `length`. Nesting is limited to 64 levels.
    """

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="Type of the format; `json_schema` requires the field of that name.",
        json_schema_extra=differs("`json_object` does not require the word JSON in a message."),
    )
    json_schema: JsonSchema | None = Field(
        None, description="The schema for type `json_schema`. Default: none."
    )

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "json_schema", "'json_schema' and the type 'json_schema' require each other"
            )
        return self


def _sampling_field(
    minimum: float, maximum: float, meaning: str, default: str, difference: str | None = None
) -> Any:
    """Return the field of a sampling parameter whose default a model may set in its own files."""
    return Field(
        None,
        ge=minimum,
        le=maximum,
        description=f"{meaning} Default: the model's generation_config.json, else {default}.",
        json_schema_extra=None if difference is None else differs(difference),
    )


class CompletionParameters(StrictModel):
    """Parameters of both endpoints; null means the default."""

    model: str = Field(description="Name of the model, as listed by /v1/models.")
    stream: bool | None = Field(
        False, description="Send the answer as server-sent events while it is generated."
    )
    stream_options: StreamOptions | None = Field(
        None, description="Options of a stream; requires `stream`. Default: none."
    )
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        1,
        description="Number of answers per prompt.",
        json_schema_extra=differs(f"At most {MAX_CHOICES} instead of 128."),
    )
    temperature: float | None = _sampling_field(
        0, 2, "Sampling temperature; 0 is greedy decoding.", "1"
    )
    top_p: float | None = _sampling_field(0, 1, "Nucleus (top-p) sampling threshold.", "1")
    top_k: int | None = _sampling_field(
        0, MAX_INT, "Keep only the k most likely tokens; 0 disables.", "0", EXTENSION
    )
    min_p: float | None = _sampling_field(
        0, 1, "Drop tokens below this fraction of the top token's probability.", "0", EXTENSION
    )
    repetition_penalty: float | None = _sampling_field(
        0.01,
        100,
        "Penalize tokens of prompt and answer; 1 disables (Keskar et al. 2019).",
        "1",
        EXTENSION,
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        0, description="Subtracted from the logits of tokens that occur in the answer."
    )
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        0, description="Subtracted from a token's logit once per occurrence in the answer."
    )
    logit_bias: LogitBias | None = Field(
        None,
        description="Map from token id to a value (-100 to 100) added to its logit. Default: none.",
        json_schema_extra=differs("Ids of the served model's own tokenizer."),
    )
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        None,
        description="Random seed. Default: random.",
        json_schema_extra=differs("Reproducible on CPU, where OpenAI promises best effort."),
    )
    stop: Stop | None = Field(
        None,
        description=f"Up to {MAX_STOP_STRINGS} strings that end the answer; the answer does not "
        "include them. Default: none.",
        json_schema_extra=differs("Cannot be combined with a JSON `response_format`."),
    )
    user: str | None = Field(
        None, description="ID of the end user. Default: none.", json_schema_extra=ignored()
    )
    safety_identifier: str | None = Field(
        None,
        description="ID of the end user for abuse detection. Default: none.",
        json_schema_extra=ignored(),
    )
    metadata: Metadata | None = Field(
        None,
        description="Key-value pairs to store with the completion. Default: none.",
        json_schema_extra=ignored("No effect: nothing is stored."),
    )
    store: bool | None = Field(
        False,
        description="Store the completion.",
        json_schema_extra=ignored("No effect: nothing is stored."),
    )
    service_tier: str | None = Field(
        "auto", description="Processing tier.", json_schema_extra=ignored("No effect: one tier.")
    )
    prompt_cache_key: str | None = Field(
        None,
        description="Key for prompt caching. Default: none.",
        json_schema_extra=ignored("No effect: prefixes are always cached."),
    )
    prompt_cache_retention: str | None = Field(
        None,
        description="Retention of the prompt cache. Default: none.",
        json_schema_extra=ignored(),
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_noop_fields(cls, value: Any) -> Any:
        return without_noops(value, UNSUPPORTED)

    @property
    def num_choices(self) -> int:
        """Number of answers per prompt."""
        return self.n or 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """True if a stream ends with a chunk of token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


_NO_LIMIT = "-1 (up to the context length) is not in OpenAI's API."
_MAX_TOKENS = "Maximum number of generated tokens; -1 = up to the context length."
_CHAT_DEFAULT = "Default: max_new_tokens of the model's generation_config.json, else -1."


class ChatRequest(CompletionParameters):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=2048)] = (
        Field(description="The conversation so far.")
    )
    max_completion_tokens: token_count(1) | None = Field(  # type: ignore[valid-type]
        None, description=f"{_MAX_TOKENS} {_CHAT_DEFAULT}", json_schema_extra=differs(_NO_LIMIT)
    )
    max_tokens: token_count(1) | None = Field(  # type: ignore[valid-type]
        None,
        description=f"Older name of `max_completion_tokens`. {_CHAT_DEFAULT}",
        json_schema_extra=differs(_NO_LIMIT),
    )
    logprobs: bool | None = Field(
        False, description="Return the log-probability of each generated token."
    )
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        0,
        description="Number of most likely tokens to return per position; requires `logprobs`.",
    )
    response_format: ResponseFormat | None = Field(
        None, description="Output format. Default: text."
    )
    truncation: Literal["auto", "disabled"] | None = Field(
        "disabled",
        description="`auto`: drop the oldest turns of a conversation that exceeds the context; the "
        "response header minimind-left-out has the number of dropped messages.",
        json_schema_extra=differs("Exists in OpenAI's Responses API, not in chat completions."),
    )
    parallel_tool_calls: bool | None = Field(
        True,
        description="Allow several tool calls per answer.",
        json_schema_extra=ignored("No effect: tools are not supported."),
    )

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must follow, if the request has one."""
        schema = self.response_format and self.response_format.json_schema
        return (schema and schema.definition) or None


class CompletionRequest(CompletionParameters):
    """POST /v1/completions."""

    prompt: Prompt = Field(
        description="Text to continue: a string, a list of token ids, or a list of either.",
        json_schema_extra=differs(
            f"At most {MAX_CHOICES} prompts; token ids are those of the served model."
        ),
    )
    max_tokens: token_count(0) | None = Field(  # type: ignore[valid-type]
        COMPLETION_TOKENS,
        description=_MAX_TOKENS,
        json_schema_extra=differs(_NO_LIMIT),
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = Field(
        None,
        description="Return log-probabilities, and this number of most likely tokens per position. "
        "Default: none.",
    )
    echo: bool | None = Field(
        False,
        description="Return the prompt before the continuation; with `logprobs`, also the "
        "log-probabilities of its tokens.",
    )
