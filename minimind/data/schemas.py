"""The shapes of records that people's data comes in, and how each becomes ours.

    text           {"text"}
    conversations  {"conversations": [{"role", "content"}…]}       messages: the same, by OpenAI
    sharegpt       {"conversations": [{"from", "value"}…]}
    alpaca         {"instruction", "input", "output"}, with "history" and "system" if there are any
    qa             {"q", "a"}, with "history" if there is any
    pairs          {"chosen": […], "rejected": […]}, or texts beside a "prompt"

`{{name}}` and `{{author}}` in what is written stand for what a recipe's data.fill says.
A field that goes by several names is looked for under each of them.
"""

import ast
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from minimind.tokenizer.chat import ROLES, Message

_ROLE_OF = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
_ROLE_OF |= {"observation": "tool", "function": "tool", "prompter": "user", "model": "assistant"}
_ROLE_OF |= {role: role for role in ROLES}

_TURNS = ("messages", "conversations", "conversation")
_QUESTION = ("q", "question", "prompt")
_ANSWER = ("a", "answer", "response")
_PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_CHOSEN, _REJECTED = ("chosen", "chose"), ("rejected", "reject")


@dataclass(frozen=True, slots=True)
class Record:
    """Running text, or a conversation, or a pair of conversations of which one is preferred."""

    text: str | None = None
    messages: list[Message] | None = None
    chosen: list[Message] | None = None
    rejected: list[Message] | None = None
    schema: str = field(default="text", compare=False)  # what it was made from

    @property
    def kind(self) -> str:
        """ "text", "messages" or "pair"."""
        if self.text is not None:
            return "text"
        return "messages" if self.messages is not None else "pair"

    @property
    def texts(self) -> list[str]:
        """All that is written in it, each thing once."""
        if self.text is not None:
            return [self.text]
        return [message["content"] for message in self._each_once()]

    def as_text(self) -> str:
        """`texts` as one."""
        return "\n".join(self.texts)

    def fingerprint(self) -> int:
        """64 bits that depend on what is written in it alone."""
        roles = [message["role"] for message in self._each_once()]
        whole = "\0".join([*self.texts, *roles]).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(whole, digest_size=8).digest(), "big")

    def split_key(self) -> int:
        """64 bits that decide whether it is held out.

        Of a pair the prompt alone: what is learned of one pair must not be asked in another.
        """
        if self.kind != "pair":
            return self.fingerprint()
        return Record(messages=(self.chosen or [])[: self.num_shared]).fingerprint()

    @property
    def num_shared(self) -> int:
        """How many messages a pair's sides begin with alike: the prompt."""
        sides = zip(self.chosen or [], self.rejected or [], strict=False)
        return sum(1 for _ in takewhile(lambda both: both[0] == both[1], sides))

    def filled(self, fill: Mapping[str, str]) -> "Record":
        """The same with each `{{key}}` in what is written replaced by its value."""
        if not fill:
            return self

        def messages(given: list[Message] | None) -> list[Message] | None:
            return given and [
                {"role": message["role"], "content": fill_in(message["content"], fill)}
                for message in given
            ]

        return replace(
            self,
            text=None if self.text is None else fill_in(self.text, fill),
            messages=messages(self.messages),
            chosen=messages(self.chosen),
            rejected=messages(self.rejected),
        )

    def _each_once(self) -> list[Message]:
        return self.messages or [*(self.chosen or []), *(self.rejected or [])[-1:]]


def fill_in(text: str, fill: Mapping[str, str]) -> str:
    """`text` with each `{{key}}` of which `fill` has the key replaced."""
    return _PLACEHOLDER.sub(lambda found: fill.get(found[1], found[0]), text)


def placeholders(text: str) -> set[str]:
    """The words that are in the text as `{{word}}`."""
    return set(_PLACEHOLDER.findall(text)) if "{{" in text else set()


def detect_schema(record: Mapping[str, Any]) -> str:
    """Name the schema of a record. Raises ValueError when it is none that is known."""
    if _first(record, _CHOSEN) is not None and _first(record, _REJECTED) is not None:
        return "pairs"
    if isinstance(record.get("messages"), list):
        return "messages"
    turns = _first(record, _TURNS)
    if isinstance(turns, list):
        said_by = turns[0].keys() if turns and isinstance(turns[0], dict) else ()
        return "sharegpt" if "from" in said_by else "conversations"
    if "instruction" in record and "output" in record:
        return "alpaca"
    if _first(record, _QUESTION) is not None and _first(record, _ANSWER) is not None:
        return "qa"
    if "text" in record:
        return "text"
    raise ValueError(f"of no known schema; its fields are: {_names(record)}")


def convert(record: Mapping[str, Any], schema: str = "auto") -> Record:
    """Turn a record of the given schema into ours. Raises ValueError with the reason it cannot."""
    name = detect_schema(record) if schema == "auto" else schema
    return replace(_CONVERTERS[name](record), schema=name)


def _text(record: Mapping[str, Any]) -> Record:
    text = _string(record, ("text",))
    if not text.strip():
        raise ValueError("the text is empty")
    return Record(text=text)


def _messages(record: Mapping[str, Any]) -> Record:
    turns = _first(record, _TURNS)
    if turns is None:
        raise _missing(record, _TURNS)
    messages = _turns(turns)
    if messages[0]["role"] != "system":
        messages = [*_system(record), *messages]
    return Record(messages=_answered(messages))


def _alpaca(record: Mapping[str, Any]) -> Record:
    asked = _string(record, ("instruction",))
    extra = record.get("input")
    if isinstance(extra, str) and extra.strip():
        asked = f"{asked}\n{extra}" if asked.strip() else extra
    return _with_history(record, asked, _string(record, ("output",)))


def _qa(record: Mapping[str, Any]) -> Record:
    return _with_history(record, _string(record, _QUESTION), _string(record, _ANSWER))


def _with_history(record: Mapping[str, Any], asked: str, answer: str) -> Record:
    if not asked.strip():
        raise ValueError("the question is empty")
    messages = _system(record)
    for question, reply in [*_history(record.get("history")), (asked, answer)]:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": reply})
    return Record(messages=_answered(messages))


def _system(record: Mapping[str, Any]) -> list[Message]:
    system = record.get("system")
    if isinstance(system, str) and system.strip():
        return [{"role": "system", "content": system}]
    return []


def _history(value: Any) -> list[tuple[str, str]]:
    """History as a list of pairs; CSV files hold it as the text of a list, JSON's or Python's."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            try:
                with warnings.catch_warnings():  # of "\\d" and the like
                    warnings.simplefilter("ignore")
                    value = ast.literal_eval(value.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                raise ValueError("history is not a list of pairs") from None
    if not isinstance(value, list) or not all(_is_pair(pair) for pair in value):
        raise ValueError("history is not a list of pairs")
    return [(question, reply) for question, reply in value]


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(side, str) for side in value)
    )


def _pairs(record: Mapping[str, Any]) -> Record:
    chosen, rejected = _first(record, _CHOSEN), _first(record, _REJECTED)
    if chosen is None or rejected is None:
        raise _missing(record, _CHOSEN if chosen is None else _REJECTED)
    prompt = _prompt(record)
    sides = [_answered(_side(prompt, side)) for side in (chosen, rejected)]
    pair = Record(chosen=sides[0], rejected=sides[1])
    apart = [side[pair.num_shared :] for side in sides]
    if any(apart) and not all(side and side[0]["role"] == "assistant" for side in apart):
        raise ValueError("chosen and rejected are not answers to the same messages")
    return pair


def _prompt(record: Mapping[str, Any]) -> list[Message]:
    """What stands before both answers; nothing where they are whole conversations themselves."""
    asked = _first(record, (*_TURNS, *_QUESTION))
    if isinstance(asked, str):
        return [*_system(record), {"role": "user", "content": asked}]
    return _turns(asked) if asked is not None else []


def _side(prompt: list[Message], side: Any) -> list[Message]:
    if isinstance(side, str):
        if not prompt:
            raise ValueError("chosen and rejected are texts, and there is no prompt beside them")
        return [*prompt, {"role": "assistant", "content": side}]
    messages = _turns([side] if isinstance(side, dict) else side)
    return messages if messages[0]["role"] != "assistant" else [*prompt, *messages]


def _turns(turns: Any) -> list[Message]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("messages are not a list of objects")
    if not turns:
        raise ValueError("the list of messages is empty")
    messages: list[Message] = []
    for turn in turns:
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role.lower() not in _ROLE_OF:
            raise ValueError(f"unknown role {role!r}; known are {', '.join(_ROLE_OF)}")
        if not isinstance(content, str):
            raise ValueError(f"a message of the {_ROLE_OF[role.lower()]} holds no text")
        messages.append({"role": _ROLE_OF[role.lower()], "content": content})
    return messages


def _answered(messages: list[Message]) -> list[Message]:
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError("nobody answers in the conversation")
    if not all(answer.strip() for answer in answers):
        raise ValueError("an answer is empty")
    return messages


def _string(record: Mapping[str, Any], names: tuple[str, ...]) -> str:
    value = _first(record, names)
    if value is None and not any(name in record for name in names):
        raise _missing(record, names)
    if not isinstance(value, str):
        raise ValueError(f"the field {' or '.join(names)} is not text")
    return value


def _missing(record: Mapping[str, Any], names: tuple[str, ...]) -> ValueError:
    return ValueError(f"no field {' or '.join(names)}; its fields are: {_names(record)}")


def _names(record: Iterable[Any]) -> str:
    return ", ".join(map(str, list(record)[:6])) or "none"


def _first(record: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


_CONVERTERS: dict[str, Callable[[Mapping[str, Any]], Record]] = {
    "text": _text,
    "conversations": _messages,
    "messages": _messages,
    "sharegpt": _messages,
    "alpaca": _alpaca,
    "qa": _qa,
    "pairs": _pairs,
}
SCHEMAS = tuple(_CONVERTERS)
