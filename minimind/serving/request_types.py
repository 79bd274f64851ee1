"""Types of request parameters, strict and bounded.

Unions are discriminated by the JSON type of the value, so that an error names the type that the
client meant instead of one error per alternative.
"""

from collections.abc import Callable
from typing import Annotated, Any

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

MAX_CHOICES = 16
MAX_STOP_STRINGS = 4
MAX_INT = 2**31 - 1
_MAX_BIASES = 1024
_MAX_KEYS = 256  # per object


class StrictModel(BaseModel):
    """A JSON object without unknown fields; values are not coerced ("1" is not 1)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _limit_keys(cls, value: Any) -> Any:
        return limit_keys(value, _MAX_KEYS)


def limit_keys(value: Any, max_keys: int) -> Any:
    """Raise for an object with too many keys.

    Pydantic reports each invalid key, and 100,000 errors would block the event loop. Lists stop at
    their first error (`fail_fast`).
    """
    if isinstance(value, dict) and len(value) > max_keys:
        raise PydanticCustomError("too_many_keys", f"it has more than {max_keys:,} keys")
    return value


def without_noops(value: Any, noops: dict[str, tuple[Any, ...]]) -> Any:
    """Return the object without the keys whose values have no effect."""
    if not isinstance(value, dict):
        return value
    dropped = {
        key
        for key in noops.keys() & value.keys()
        # Types are compared because False == 0 and 1 == True.
        if any(value[key] == noop and type(value[key]) is type(noop) for noop in noops[key])
    }
    return {key: value[key] for key in value if key not in dropped} if dropped else value


def token_count(minimum: int) -> Any:
    """Return the type of a token limit: -1 (no limit but the context), or at least `minimum`."""

    def check(value: int) -> int:
        if value != -1 and not minimum <= value <= MAX_INT:
            raise PydanticCustomError(
                "token_count", f"it must be -1 (no limit but the context) or at least {minimum}"
            )
        return value

    number = {"type": "integer", "minimum": minimum, "maximum": MAX_INT}
    schema = WithJsonSchema({"anyOf": [{"const": -1, "type": "integer"}, number]})
    return Annotated[int, AfterValidator(check), schema]


def union_by(tag_of: Callable[[Any], str | None], expected: str) -> Discriminator:
    """Return a discriminator that selects one alternative of a union.

    Tags look like types ("str", "list[str]"): `errors.validation_error` drops them from paths.
    """
    return Discriminator(
        tag_of, custom_error_type="wrong_type", custom_error_message=f"it must be {expected}"
    )


def string_or_list(value: Any) -> str | None:
    """Return the tag of a string or a list."""
    return "str" if isinstance(value, str) else "list[]" if isinstance(value, list) else None


def _prompt_tag(value: Any) -> str | None:
    if not isinstance(value, list):
        return "str" if isinstance(value, str) else None
    if value and isinstance(value[0], int):
        return "list[int]"
    return "list[list[int]]" if value and isinstance(value[0], list) else "list[str]"


_StopString = Annotated[str, Field(min_length=1, max_length=1000)]
Stop = Annotated[
    Annotated[_StopString, Tag("str")]
    | Annotated[
        list[_StopString], Field(fail_fast=True, max_length=MAX_STOP_STRINGS), Tag("list[]")
    ],
    union_by(string_or_list, "a string or a list of strings"),
]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=_MAX_BIASES),
    BeforeValidator(lambda value: limit_keys(value, _MAX_BIASES)),
]
Metadata = Annotated[dict[str, Any], BeforeValidator(lambda value: limit_keys(value, _MAX_KEYS))]
_TokenIds = Annotated[list[int], Field(fail_fast=True, min_length=1)]
Prompt = Annotated[
    Annotated[str, Tag("str")]
    | Annotated[
        list[str], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES), Tag("list[str]")
    ]
    | Annotated[_TokenIds, Tag("list[int]")]
    | Annotated[
        list[_TokenIds],
        Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES),
        Tag("list[list[int]]"),
    ],
    union_by(_prompt_tag, "a string, a list of strings, or one or several lists of token ids"),
]
