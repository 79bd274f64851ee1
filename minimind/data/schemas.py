"""Schemas: the layouts of published datasets, and their conversion to one `Record` class.

    text               {"text"} or {"content"}
    conversations      {"conversations": [{"role", "content"}…]}
    messages           {"messages": [{"role", "content"}…]}, the layout of OpenAI
    sharegpt           {"conversations": [{"from", "value"}…]}
    alpaca             {"instruction", "input", "output"}, optionally "history" and "system"
    qa                 {"q", "a"}, optionally "history"
    prompt_completion  {"prompt", "completion"}: strings, or lists of messages
    pairs              {"chosen": […], "rejected": […]}, or strings with a "prompt"

A text such as "<s>…</s> <s>…</s>", in which MiniMind packed several documents, is split at the
markers.
Template variables such as `{{name}}` are replaced by their values in data.variables of a recipe.
Several field names have synonyms. A field of the wrong type makes the record invalid, except that
integers are read as text. Unused keys are recorded.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from minimind.data.messages import Fields, Turn, as_text, holds_messages, parse_list, read_turns
from minimind.tokenizer.chat import Message

_TEXT = ("text", "content")
TURNS = ("messages", "conversations", "conversation")
_QUESTION = ("q", "question", "prompt")
_ANSWER = ("a", "answer", "response")
_PROMPT_COMPLETION = ("prompt", "completion")
_MAX_KEYS, _MAX_KEY_LENGTH = 100, 80
_PACKED = re.compile(r"\s*<s>(.*)</s>\s*", re.DOTALL)
_DOCUMENT_BORDER = re.compile(r"</s>\s*<s>")
_VARIABLE = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_CHOSEN, _REJECTED = ("chosen", "chose"), ("rejected", "reject")


@dataclass(frozen=True, slots=True)
class Record:
    """Running text, a conversation, or a preference pair of two conversations.

    unsupervised: for each conversation, the indices of the messages that the source excludes from
    the loss; empty if there are none.
    """

    text: str | None = None
    messages: list[Message] | None = None
    chosen: list[Message] | None = None
    rejected: list[Message] | None = None
    unsupervised: tuple[frozenset[int], ...] = ()
    schema: str = field(default="text", compare=False)  # of the source
    unused: tuple[str, ...] = field(default=(), compare=False)  # keys, such as "messages[].name"

    @property
    def kind(self) -> str:
        """Kind of record: "text", "messages" or "pair"."""
        if self.text is not None:
            return "text"
        return "messages" if self.messages is not None else "pair"

    @property
    def texts(self) -> list[str]:
        """Contents of all messages, or the text; the shared prompt of a pair only once."""
        if self.text is not None:
            return [self.text]
        return [message["content"] for message in self._distinct_messages()]

    @property
    def num_characters(self) -> int:
        """Number of characters of `texts`."""
        return sum(map(len, self.texts))

    def as_text(self) -> str:
        """Return `texts`, joined by newlines."""
        return "\n".join(self.texts)

    def fingerprint(self) -> int:
        """Return a 64-bit hash of texts and roles, to find duplicates."""
        # --8<-- [start:fingerprint]
        roles = [message["role"] for message in self._distinct_messages()]
        content = "\0".join([*self.texts, *roles]).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
        # --8<-- [end:fingerprint]

    def split_key(self) -> int:
        """Return the 64-bit hash that decides between training and validation.

        For a pair it covers only the prompt, if there is one: all pairs of a prompt belong to the
        same split.
        """
        if self.kind != "pair" or not self.num_shared:
            return self.fingerprint()
        return Record(messages=(self.chosen or [])[: self.num_shared]).fingerprint()

    @property
    def num_shared(self) -> int:
        """Number of messages that both sides of a pair begin with: the prompt."""
        sides = zip(self.chosen or [], self.rejected or [], strict=False)
        return sum(1 for _ in takewhile(lambda both: both[0] == both[1], sides))

    @property
    def conversations(self) -> list[tuple[list[Message], frozenset[int]]]:
        """Conversations, each with the indices of its messages that are not supervised.

        Two for a preference pair, whose prompt is not supervised; none for running text.
        """
        sides = [side for side in (self.messages, self.chosen, self.rejected) if side is not None]
        prompt = frozenset(range(self.num_shared))
        marks = self.unsupervised or (frozenset[int](),) * len(sides)
        return [(side, prompt | marked) for side, marked in zip(sides, marks, strict=True)]

    def substitute(self, variables: Mapping[str, str]) -> "Record":
        """Return a copy with the values of `variables` in place of `{{variable}}`."""
        if not variables:
            return self

        def substituted(messages: list[Message] | None) -> list[Message] | None:
            return messages and [
                {
                    "role": message["role"],
                    "content": substitute_variables(message["content"], variables),
                }
                for message in messages
            ]

        return replace(
            self,
            text=None if self.text is None else substitute_variables(self.text, variables),
            messages=substituted(self.messages),
            chosen=substituted(self.chosen),
            rejected=substituted(self.rejected),
        )

    def _distinct_messages(self) -> list[Message]:
        return self.messages or [*(self.chosen or []), *(self.rejected or [])[self.num_shared :]]


def substitute_variables(text: str, variables: Mapping[str, str]) -> str:
    """Replace each `{{variable}}` by its value; unknown variables stay."""
    return _VARIABLE.sub(lambda match: variables.get(match[1], match[0]), text)


def variables_in(text: str) -> set[str]:
    """Return the names of the template variables in a text."""
    return set(_VARIABLE.findall(text)) if "{{" in text else set()


def count_unused(counts: "Counter[str]", record: Record) -> None:
    """Count the unused keys of a record; beyond 100 keys, count them as "other keys"."""
    for key in record.unused:
        name = "".join(c if c.isprintable() else "\ufffd" for c in key[:_MAX_KEY_LENGTH])
        if name not in counts and len(counts) >= _MAX_KEYS:
            name = "other keys"
        counts[name] += 1


def detect_schema(record: Mapping[str, Any]) -> str:
    """Return the name of a record's schema. Raises ValueError for an unknown schema."""
    fields = Fields(record)
    if fields.name_of_first(_CHOSEN) and fields.name_of_first(_REJECTED):
        return "pairs"
    turns = fields.name_of_first(TURNS)
    if turns and isinstance(_list_or_none(record[turns]), list):
        return _schema_of_turns(turns, record[turns])
    if "instruction" in record and "output" in record:
        return "alpaca"
    if fields.name_of_first(("prompt",)) and fields.name_of_first(("completion",)):
        return "prompt_completion"
    if fields.name_of_first(_QUESTION) and fields.name_of_first(_ANSWER):
        return "qa"
    if "text" in record:
        return "text"
    if turns:
        return _schema_of_turns(turns, record[turns])
    if "content" in record:
        return "text"
    raise ValueError(f"unknown schema; its fields are: {fields.listed()}")


def _list_or_none(value: Any) -> Any:
    try:
        return parse_list(value)
    except ValueError:
        return None


def _schema_of_turns(name: str, value: Any) -> str:
    if name == "messages":
        return "messages"
    turns = _list_or_none(value)
    first = turns[0] if isinstance(turns, list) and turns else None
    return "sharegpt" if isinstance(first, dict) and "from" in first else "conversations"


def convert(record: Mapping[str, Any], schema: str = "auto") -> Record:
    """Convert a record of the given schema. Raises ValueError with the reason if it is invalid."""
    name = detect_schema(record) if schema == "auto" else schema
    fields = Fields(record)
    if name != "text":
        fields.check_supported()
    converted = _CONVERTERS[name](fields)
    return replace(converted, schema=name, unused=tuple(sorted(fields.unused())))


def split_packed(record: Record) -> list[Record]:
    """Return the documents of a text that MiniMind packed as `<s>…</s> <s>…</s>`.

    Other records are returned unchanged. The markers must enclose all of the text, since `<s>` is
    also an HTML tag.
    """
    packed = _PACKED.fullmatch(record.text or "")
    if packed is None:
        return [record]
    documents = _DOCUMENT_BORDER.split(packed[1])
    return [replace(record, text=text) for text in documents if text.strip()]


def _text(fields: Fields) -> Record:
    text = fields.string(_TEXT)
    if not text.strip():
        raise ValueError("the text is empty")
    return Record(text=text)


def _messages(fields: Fields) -> Record:
    name = fields.name_of_first(TURNS)
    if name is None:
        raise fields.missing(TURNS)
    return _conversation(_with_system(fields, read_turns(fields.first((name,)), fields, name)))


def _alpaca(fields: Fields) -> Record:
    prompt = _prompt(fields, _instruction(fields))
    return _conversation([*prompt, Turn("assistant", fields.string(("output",)))])


def _qa(fields: Fields) -> Record:
    prompt = _prompt(fields, fields.string(_QUESTION))
    return _conversation([*prompt, Turn("assistant", fields.string(_ANSWER))])


def _prompt_completion(fields: Fields) -> Record:
    """Convert a record in the prompt-completion layout of TRL.

    A prompt that is a string becomes a user message. In a prompt that is a list of messages, the
    answers are not supervised.
    """
    for name in _PROMPT_COMPLETION:
        if fields.name_of_first((name,)) is None:
            raise fields.missing((name,))
    prompt, completion = (fields.first((name,)) for name in _PROMPT_COMPLETION)
    for mark in ("label", "kto_tag"):
        if isinstance(fields.values.get(mark), bool) and not fields.first((mark,)):
            raise ValueError(f"{mark} is false: the completion is marked as undesirable")
    if isinstance(prompt, list) or holds_messages(prompt):
        turns = read_turns(prompt, fields, "prompt")
        context = _with_system(fields, [turn._replace(supervised=False) for turn in turns])
        completion = parse_list(completion) if holds_messages(completion) else completion
    else:
        context = _prompt(fields, as_text(prompt, "the field prompt"))
    answer = (
        read_turns(completion, fields, "completion")
        if isinstance(completion, list)
        else [Turn("assistant", as_text(completion, "the field completion"))]
    )
    if answer[0].role != "assistant":
        raise ValueError("the completion does not begin with an answer")
    return _conversation([*context, *answer])


def _instruction(fields: Fields) -> str:
    """Join the instruction and the input of an Alpaca record; one of them may be empty."""
    instruction = fields.string(("instruction",))
    extra = fields.first(("input",))
    extra = "" if extra is None else as_text(extra, "the field input")
    return "\n".join(part for part in (instruction, extra) if part.strip())


def _prompt(fields: Fields, question: str) -> list[Turn]:
    """Return the turns up to the answer: system prompt, history, question."""
    if not question.strip():
        raise ValueError("the question is empty")
    turns = []
    for earlier, answer in _history(fields.first(("history",))):
        turns += [Turn("user", earlier), Turn("assistant", answer)]
    return _with_system(fields, [*turns, Turn("user", question)])


def _with_system(fields: Fields, turns: list[Turn]) -> list[Turn]:
    """Prepend the record's system prompt, unless the turns begin with a system message."""
    value = fields.values.get("system")
    system = "" if value is None else as_text(value, "the field system")
    own = turns[0].content if turns[0].role == "system" else None
    if own is None or own == system:
        fields.first(("system",))
    return [Turn("system", system), *turns] if own is None and system.strip() else turns


def _history(value: Any) -> list[tuple[str, str]]:
    """Return the history as a list of pairs. In CSV it is a JSON or Python list in a string."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    pairs = _list_or_none(value)
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise ValueError("history is not a list of pairs")
    return [(question, answer) for question, answer in pairs]


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(side, str) for side in value)
    )


def _pairs(fields: Fields) -> Record:
    names = [fields.name_of_first(_CHOSEN), fields.name_of_first(_REJECTED)]
    for name, known in zip(names, (_CHOSEN, _REJECTED), strict=True):
        if name is None:
            raise fields.missing(known)
    sides = _pair_sides(fields, [name for name in names if name])
    pair = _pair(*(_check_answers(side) for side in sides))
    answers = [side[pair.num_shared :] for side in sides]
    if any(answers) and not all(side and side[0].role == "assistant" for side in answers):
        raise ValueError("chosen and rejected are not answers to the same messages")
    return pair


def _pair_sides(fields: Fields, names: list[str]) -> list[list[Turn]]:
    """Return both conversations of a pair, each with its prompt."""
    answers = [fields.first((name,)) for name in names]
    if all(map(holds_messages, answers)):
        answers = list(map(parse_list, answers))
    sides = [
        read_turns(answer, fields, name)
        if isinstance(answer, list | dict)
        else [Turn("assistant", as_text(answer, f"the field {name}"))]
        for name, answer in zip(names, answers, strict=True)
    ]
    if any(side[0].role == "assistant" for side in sides):
        prompt = _pair_prompt(fields)
        if not prompt and any(isinstance(answer, str | int) for answer in answers):
            raise ValueError("chosen and rejected are strings, but there is no prompt field")
        return [[*prompt, *side] if side[0].role == "assistant" else side for side in sides]
    prompt_fields = Fields(fields.values)
    prompt = _without_system(_pair_prompt(prompt_fields))
    if all(_without_system(side)[: len(prompt)] == prompt for side in sides):
        fields.used |= prompt_fields.used  # the prompt field repeats the beginning of both sides
    return [_with_system(fields, side) for side in sides]


def _pair_prompt(fields: Fields) -> list[Turn]:
    """Return the turns of the prompt field; an empty list if there is no such field."""
    name = fields.name_of_first((*TURNS, *_QUESTION))
    if name is None:
        has_instruction = fields.name_of_first(("instruction",))
        return _prompt(fields, _instruction(fields)) if has_instruction else []
    prompt = fields.first((name,))
    if isinstance(prompt, list | dict) or holds_messages(prompt):
        return _with_system(fields, read_turns(prompt, fields, name))
    return _prompt(fields, as_text(prompt, f"the field {name}"))


def _without_system(turns: list[Turn]) -> list[Turn]:
    return turns[1:] if turns and turns[0].role == "system" else turns


def _check_answers(turns: list[Turn]) -> list[Turn]:
    """Return `turns`. Raises ValueError if there is no answer, or an empty one."""
    answers = [turn.content for turn in turns if turn.role == "assistant"]
    if not answers:
        raise ValueError("the conversation has no assistant message")
    if not all(answer.strip() for answer in answers):
        raise ValueError("an answer is empty")
    return turns


def _conversation(turns: list[Turn]) -> Record:
    messages = _as_messages(_check_answers(turns))
    return Record(messages=messages, unsupervised=_unsupervised([turns]))


def _pair(chosen: list[Turn], rejected: list[Turn]) -> Record:
    return Record(
        chosen=_as_messages(chosen),
        rejected=_as_messages(rejected),
        unsupervised=_unsupervised([chosen, rejected]),
    )


def _as_messages(turns: list[Turn]) -> list[Message]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _unsupervised(sides: list[list[Turn]]) -> tuple[frozenset[int], ...]:
    """Return the indices of unsupervised answers of each conversation; () if there are none."""
    indices = tuple(
        frozenset(
            index
            for index, turn in enumerate(side)
            if turn.role == "assistant" and not turn.supervised
        )
        for side in sides
    )
    return indices if any(indices) else ()


_CONVERTERS: dict[str, Callable[[Fields], Record]] = {
    "text": _text,
    "conversations": _messages,
    "messages": _messages,
    "sharegpt": _messages,
    "alpaca": _alpaca,
    "qa": _qa,
    "prompt_completion": _prompt_completion,
    "pairs": _pairs,
}
SCHEMAS = tuple(_CONVERTERS)
