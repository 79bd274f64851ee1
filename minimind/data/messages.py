"""Messages of a training record: role, content, and whether an answer is supervised.

An answer with a mark such as `"weight": 0`, `"loss": false`, `"train": false` or `"mask": true` is
encoded but excluded from the loss. A record with tools, reasoning or
images is invalid, because the chat format cannot express them. Other keys are recorded as unused.
"""

import ast
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minimind.data.strict_json import check_characters, parse_json
from minimind.tokenizer.format import ROLES

_ROLE_OF = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
_ROLE_OF |= {"observation": "tool", "function": "tool", "prompter": "user", "model": "assistant"}
_ROLE_OF |= {role: role for role in ROLES}

_NO_TOOLS = "the chat format has no tools yet"
_NO_REASONING = "the chat format has no reasoning yet"
_NO_MEDIA = "only text is supported"
# Keys of a record or a message that change its content.
_UNSUPPORTED = {
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), _NO_TOOLS),
    **dict.fromkeys(("tool_call_id", "tool_responses"), _NO_TOOLS),
    "reasoning_content": _NO_REASONING,
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _NO_MEDIA),
}
# Only of a message: in a record these may name unrelated columns.
_UNSUPPORTED_IN_MESSAGE = _UNSUPPORTED | {
    **dict.fromkeys(("reasoning", "reasoning_details", "thinking"), _NO_REASONING),
    "refusal": "the chat format has no refusals",
    **dict.fromkeys(
        ("train_detail", "training_detail"), "an answer can only be supervised as a whole"
    ),
}
_SUPERVISED_KEYS = (
    *("weight", "loss", "train", "training", "trainable"),
    *("loss_mask", "loss_weight", "loss_scale"),
)
_MASKED_KEYS = ("mask",)  # the opposite: 1 or true excludes the answer
_TEXT_PARTS = ("text", "input_text", "output_text")
_TYPE_NAMES = {
    list: "a list",
    dict: "an object",
    bool: "true or false",
    float: "a number with a fraction",
    type(None): "null",
}


class Turn(NamedTuple):
    """A message of a conversation. `supervised` is used only for answers."""

    role: str
    content: str
    supervised: bool = True


class Fields:
    """A JSON object that records which of its keys are used, so that unused ones are reported."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values = values
        self.unused_nested: set[str] = set()  # unused keys of nested objects
        self._prefix = prefix
        self.used: set[str] = set()

    def first(self, names: Sequence[str]) -> Any:
        """Return the value of the first of these fields that is not null; mark it as used."""
        name = self.name_of_first(names)
        if name is None:
            return None
        self.used.add(name)
        return self.values[name]

    def name_of_first(self, names: Sequence[str]) -> str | None:
        """Return the name of the first of these fields that is not null."""
        return next((name for name in names if self.values.get(name) is not None), None)

    def string(self, names: Sequence[str]) -> str:
        """Return the first of these fields as text. Raises ValueError if missing or not text."""
        value = self.first(names)
        if value is None and not any(name in self.values for name in names):
            raise self.missing(names)
        return as_text(value, f"the field {' or '.join(names)}")

    def missing(self, names: Sequence[str]) -> ValueError:
        """Return the error for a record without any of these fields."""
        return ValueError(f"no field {' or '.join(names)}; its fields are: {self.listed()}")

    def listed(self) -> str:
        """Return the names of the first six fields as text, for error messages."""
        return ", ".join(map(str, list(self.values)[:6])) or "none"

    def unused(self) -> set[str]:
        """Return the keys with a value that were not used, also those of nested objects."""
        own = {
            f"{self._prefix}{key}"
            for key, value in self.values.items()
            if key not in self.used and not _is_empty(value)
        }
        return own | self.unused_nested

    def check_supported(self, unsupported: Mapping[str, str] = _UNSUPPORTED) -> None:
        """Raise ValueError for a key that changes the content and is not supported."""
        for key, reason in unsupported.items():
            value = self.values.get(key)
            if value is not False and not _is_empty(value):
                raise ValueError(f"{self._prefix}{key}: {reason}")


def as_text(value: Any, what: str) -> str:
    """Return a string unchanged and an integer in digits. Raises ValueError for other types."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(
        f"{what} is not text, but {_TYPE_NAMES.get(type(value), type(value).__name__)}"
    )


def read_turns(value: Any, record: Fields, key: str) -> list[Turn]:
    """Return the messages in the field `key` of a record.

    In CSV the list is a string in JSON or Python syntax. Unused keys of messages are recorded in
    `record`. Raises ValueError with the reason if a message is invalid.
    """
    turns = [value] if isinstance(value, dict) else parse_list(value)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{key}: messages are not a list of objects")
    if not turns:
        raise ValueError(f"{key}: the list of messages is empty")
    return [_turn(turn, record, f"{key}[].") for turn in turns]


def role_of(name: str) -> str | None:
    """Return the role that a source calls `name`; None if the name is unknown."""
    return _ROLE_OF.get(name.lower())


def _turn(values: dict[str, Any], record: Fields, prefix: str) -> Turn:
    message = Fields(values, prefix)
    message.check_supported(_UNSUPPORTED_IN_MESSAGE)
    role = message.first(("role", "from"))
    name = role
    role = role_of(name) if isinstance(name, str) else None
    if role is None:
        raise ValueError(f"unknown role {name!r}; supported are {', '.join(_ROLE_OF)}")
    if role == "tool":
        raise ValueError(f"a tool message: {_NO_TOOLS}")
    turn = Turn(role, _content(message, role, prefix), _is_supervised(message, role))
    record.unused_nested |= message.unused()
    return turn


def _content(message: Fields, role: str, prefix: str) -> str:
    value = message.first(("content", "value"))
    if value is None:
        raise ValueError(f"a {role} message has no text")
    if not isinstance(value, list):
        return as_text(value, f"the content of a {role} message")
    texts = []
    for part in value:
        if not isinstance(part, dict):
            raise ValueError(
                f"a content part of a {role} message is not an object with type and text"
            )
        fields = Fields(part, f"{prefix}content[].")
        kind = fields.first(("type",))
        if kind not in _TEXT_PARTS:
            raise ValueError(f"a content part of type {kind!r}: {_NO_MEDIA}")
        texts.append(as_text(fields.first(("text",)), f"a content part of a {role} message"))
        message.unused_nested |= fields.unused()
    return "".join(texts)


def _is_supervised(message: Fields, role: str) -> bool:
    """Read the keys that include an answer in the loss or exclude it; included by default."""
    marks: dict[str, bool] = {}
    for key in (*_SUPERVISED_KEYS, *_MASKED_KEYS):
        value = message.first((key,))
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            raise ValueError(f"a message has {key}: {value!r}; it must be 0, 1, false or true")
        marks[key] = bool(value) != (key in _MASKED_KEYS)
    if len(set(marks.values())) > 1:
        raise ValueError(f"{' and '.join(marks)} contradict each other in a message")
    if role != "assistant" and any(marks.values()):
        raise ValueError(
            f"{next(iter(marks))}: includes a {role} message in the loss; "
            "only assistant messages can be supervised"
        )
    return all(marks.values())


def parse_list(value: Any) -> Any:
    """Parse a string with a list in JSON or Python syntax; return other values unchanged.

    Raises ValueError for a string that begins like a list but is not one.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        if not str(error).startswith("not JSON"):
            raise
    try:
        with warnings.catch_warnings():  # about invalid escapes such as "\\d"
            warnings.simplefilter("ignore")
            parsed = ast.literal_eval(value.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise ValueError("a string that begins like a list is neither JSON nor Python") from None
    check_characters(parsed)
    return parsed


def holds_messages(value: Any) -> bool:
    """Return True for a list of objects with roles, or a string that contains one."""
    try:
        turns = parse_list(value)
    except ValueError:
        return False
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns)
    )


def _is_empty(value: Any) -> bool:
    """Return True for null, a blank string, and a container with no values except null."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, dict):
        return all(member is None for member in value.values())
    if isinstance(value, list):
        return all(member is None for member in value)
    return value is None
