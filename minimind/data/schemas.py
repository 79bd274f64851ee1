"""The shapes of records that people's data comes in, and how each becomes ours."""

import ast
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from minimind.tokenizer.chat import ROLES, Message

_ROLE_OF = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
_ROLE_OF |= {"observation": "tool", "function": "tool", "prompter": "user", "model": "assistant"}
_ROLE_OF |= {role: role for role in ROLES}


@dataclass(frozen=True, slots=True)
class Record:
    """Running text, or a conversation, or a pair of conversations of which one is preferred."""

    text: str | None = None
    messages: list[Message] | None = None
    chosen: list[Message] | None = None
    rejected: list[Message] | None = None

    @property
    def kind(self) -> str:
        """"text", "messages" or "pair"."""
        if self.text is not None:
            return "text"
        return "messages" if self.messages is not None else "pair"

    def as_text(self) -> str:
        """All that is written in it."""
        if self.text is not None:
            return self.text
        messages = self.messages or [*(self.chosen or []), *(self.rejected or [])[-1:]]
        return "\n".join(message["content"] for message in messages)


def detect_schema(record: Mapping[str, Any]) -> str:
    """Name the schema of a record. Raises ValueError when it is none that is known."""
    keys = record.keys()
    if _first(record, "chosen", "chose") is not None and "rejected" in keys | _renamed(keys):
        return "pairs"
    if isinstance(record.get("messages"), list):
        return "messages"
    turns = record.get("conversations", record.get("conversation"))
    if isinstance(turns, list) and turns and isinstance(turns[0], dict):
        return "sharegpt" if "from" in turns[0] else "conversations"
    if "instruction" in keys and "output" in keys:
        return "alpaca"
    if _first(record, "q", "question", "prompt") is not None and (
        _first(record, "a", "answer", "response") is not None
    ):
        return "qa"
    if isinstance(record.get("text"), str):
        return "text"
    shown = ", ".join(map(str, list(keys)[:6])) or "none"
    raise ValueError(f"unrecognised record with the fields: {shown}")


def convert(record: Mapping[str, Any], schema: str = "auto") -> Record:
    """Turn a record of the given schema into ours. Raises ValueError with the reason it cannot."""
    name = detect_schema(record) if schema == "auto" else schema
    return _CONVERTERS[name](record)


def _text(record: Mapping[str, Any]) -> Record:
    text = record.get("text")
    if not isinstance(text, str):
        raise ValueError("no text in the field text")
    if not text.strip():
        raise ValueError("empty text")
    return Record(text=text)


def _messages(record: Mapping[str, Any]) -> Record:
    turns = _first(record, "messages", "conversations", "conversation")
    if not isinstance(turns, list):
        raise ValueError("no list of messages in messages or conversations")
    messages = _turns(turns)
    system = record.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Record(messages=_conversation(messages))


def _alpaca(record: Mapping[str, Any]) -> Record:
    asked = _string(record, "instruction")
    extra = record.get("input")
    if isinstance(extra, str) and extra.strip():
        asked = f"{asked}\n{extra}" if asked.strip() else extra
    return _with_history(record, asked, _string(record, "output"))


def _qa(record: Mapping[str, Any]) -> Record:
    asked = _first(record, "q", "question", "prompt")
    answer = _first(record, "a", "answer", "response")
    if not isinstance(asked, str) or not isinstance(answer, str):
        raise ValueError("question or answer is not text")
    return _with_history(record, asked, answer)


def _with_history(record: Mapping[str, Any], asked: str, answer: str) -> Record:
    messages: list[Message] = []
    system = record.get("system")
    if isinstance(system, str) and system.strip():
        messages.append({"role": "system", "content": system})
    for question, reply in _history(record.get("history")):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": reply})
    messages.append({"role": "user", "content": asked})
    messages.append({"role": "assistant", "content": answer})
    return Record(messages=_conversation(messages))


def _history(value: Any) -> list[tuple[str, str]]:
    """History as a list of pairs; CSV files hold it as the text of a list."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                raise ValueError("history is not a list of pairs") from None
    pairs = [tuple(pair) for pair in value] if isinstance(value, list) else None
    if pairs is None or any(
        len(pair) != 2 or not all(isinstance(side, str) for side in pair) for pair in pairs
    ):
        raise ValueError("history is not a list of pairs")
    return pairs


def _pairs(record: Mapping[str, Any]) -> Record:
    chosen = _first(record, "chosen", "chose")
    rejected = _first(record, "rejected", "reject")
    if isinstance(chosen, list) and isinstance(rejected, list):
        return Record(
            chosen=_conversation(_turns(chosen)), rejected=_conversation(_turns(rejected))
        )
    asked = _first(record, "prompt", "question", "q")
    if isinstance(chosen, dict) and isinstance(rejected, dict) and "conversations" in record:
        prompt = _turns(record["conversations"])
        return Record(
            chosen=_conversation([*prompt, *_turns([chosen])]),
            rejected=_conversation([*prompt, *_turns([rejected])]),
        )
    prompt = _turns(asked) if isinstance(asked, list) else [{"role": "user", "content": asked}]
    answers = [[*prompt, {"role": "assistant", "content": side}] for side in (chosen, rejected)]
    return Record(chosen=_conversation(answers[0]), rejected=_conversation(answers[1]))


def _turns(turns: list[Any]) -> list[Message]:
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("messages are empty, or not objects")
    messages: list[Message] = []
    for turn in turns:
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role.lower() not in _ROLE_OF:
            raise ValueError(f"unknown role {role!r}")
        if not isinstance(content, str):
            raise ValueError("a message's content is not text")
        messages.append({"role": _ROLE_OF[role.lower()], "content": content})
    return messages


def _conversation(messages: list[Message]) -> list[Message]:
    """Check that somebody asks something; an empty answer is found out when it is packed."""
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError("no answer in the conversation")
    for message in messages:
        if not isinstance(message["content"], str):
            raise ValueError("a message's content is not text")
    if not any(m["content"].strip() for m in messages if m["role"] == "assistant"):
        raise ValueError("the answer is empty")
    return messages


def _string(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f"the field {key} is not text")
    return value


def _first(record: Mapping[str, Any], *names: str) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _renamed(keys: Any) -> set[str]:
    return {"rejected"} if "reject" in keys else set()


_CONVERTERS: dict[str, Callable[[Mapping[str, Any]], Record]] = {
    "text": _text,
    "conversations": _messages,
    "messages": _messages,
    "sharegpt": _messages,
    "alpaca": _alpaca,
    "qa": _qa,
    "pairs": _pairs,
}
