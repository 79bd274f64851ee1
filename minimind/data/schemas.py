"""The shapes of records that people's data comes in, and how each becomes ours.

    text           {"text"}
    conversations  {"conversations": [{"role", "content"}…]}       messages: the same, by OpenAI
    sharegpt       {"conversations": [{"from", "value"}…]}
    alpaca         {"instruction", "input", "output"}, with "history" and "system" if there are any
    qa             {"q", "a"}, with "history" if there is any
    prompt_completion  {"prompt", "completion"}: texts, or lists of messages
    pairs          {"chosen": […], "rejected": […]}, or texts beside a "prompt"

`{{name}}` and `{{author}}` in what is written stand for what a recipe's data.variables says.
A field that goes by several names is looked for under each of them. A field of the wrong type makes
the record invalid, except for integers, which are read as text; keys that are not used are noted.
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

_TURNS = ("messages", "conversations", "conversation")
_QUESTION = ("q", "question", "prompt")
_ANSWER = ("a", "answer", "response")
_PROMPT_COMPLETION = ("prompt", "completion")
_MOST_KEYS, _LONGEST_KEY = 100, 80
_PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_CHOSEN, _REJECTED = ("chosen", "chose"), ("rejected", "reject")


@dataclass(frozen=True, slots=True)
class Record:
    """Running text, or a conversation, or a pair of conversations of which one is preferred.

    unsupervised: of each conversation the messages (numbers from 0) whose answers are marked as
    excluded from the loss; empty if there are none.
    """

    text: str | None = None
    messages: list[Message] | None = None
    chosen: list[Message] | None = None
    rejected: list[Message] | None = None
    unsupervised: tuple[frozenset[int], ...] = ()
    schema: str = field(default="text", compare=False)  # what it was made from
    unused: tuple[str, ...] = field(default=(), compare=False)  # keys, such as "messages[].name"

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

    @property
    def conversations(self) -> list[tuple[list[Message], frozenset[int]]]:
        """Its conversations, each with the messages that are not supervised.

        One, of a pair two, of running text none. Of a pair the prompt is not supervised.
        """
        sides = [side for side in (self.messages, self.chosen, self.rejected) if side is not None]
        prompt = frozenset(range(self.num_shared))
        marks = self.unsupervised or (frozenset[int](),) * len(sides)
        return [(side, prompt | marked) for side, marked in zip(sides, marks, strict=True)]

    def filled(self, fill: Mapping[str, str]) -> "Record":
        """The same with each `{{key}}` in what is written replaced by its value."""
        if not fill:
            return self

        def messages(given: list[Message] | None) -> list[Message] | None:
            return given and [
                {"role": message["role"], "content": substitute_variables(message["content"], fill)}
                for message in given
            ]

        return replace(
            self,
            text=None if self.text is None else substitute_variables(self.text, fill),
            messages=messages(self.messages),
            chosen=messages(self.chosen),
            rejected=messages(self.rejected),
        )

    def _each_once(self) -> list[Message]:
        return self.messages or [*(self.chosen or []), *(self.rejected or [])[self.num_shared :]]


def substitute_variables(text: str, fill: Mapping[str, str]) -> str:
    """`text` with each `{{key}}` of which `fill` has the key replaced."""
    return _PLACEHOLDER.sub(lambda found: fill.get(found[1], found[0]), text)


def variables_in(text: str) -> set[str]:
    """The words that are in the text as `{{word}}`."""
    return set(_PLACEHOLDER.findall(text)) if "{{" in text else set()


def count_unused(counts: "Counter[str]", record: Record) -> None:
    """Count the keys of a record that are not used, a bounded number of different ones."""
    for key in record.unused:
        name = "".join(c if c.isprintable() else "\ufffd" for c in key[:_LONGEST_KEY])
        if name not in counts and len(counts) >= _MOST_KEYS:
            name = "other keys"
        counts[name] += 1


def detect_schema(record: Mapping[str, Any]) -> str:
    """Name the schema of a record. Raises ValueError when it is none that is known."""
    fields = Fields(record)
    if fields.name_of_first(_CHOSEN) and fields.name_of_first(_REJECTED):
        return "pairs"
    turns = fields.name_of_first(_TURNS)
    if turns and isinstance(_list_or_none(record[turns]), list):
        return _kind_of_turns(turns, record[turns])
    if "instruction" in record and "output" in record:
        return "alpaca"
    if fields.name_of_first(("prompt",)) and fields.name_of_first(("completion",)):
        return "prompt_completion"
    if fields.name_of_first(_QUESTION) and fields.name_of_first(_ANSWER):
        return "qa"
    if "text" in record:
        return "text"
    if turns:
        return _kind_of_turns(turns, record[turns])
    raise ValueError(f"of no known schema; its fields are: {fields.listed()}")


def _list_or_none(value: Any) -> Any:
    try:
        return parse_list(value)
    except ValueError:
        return None


def _kind_of_turns(name: str, value: Any) -> str:
    if name == "messages":
        return "messages"
    turns = _list_or_none(value)
    first = turns[0] if isinstance(turns, list) and turns else None
    return "sharegpt" if isinstance(first, dict) and "from" in first else "conversations"


def convert(record: Mapping[str, Any], schema: str = "auto") -> Record:
    """Turn a record of the given schema into ours. Raises ValueError with the reason it cannot."""
    name = detect_schema(record) if schema == "auto" else schema
    fields = Fields(record)
    if name != "text":
        fields.check_supported()
    made = _CONVERTERS[name](fields)
    return replace(made, schema=name, unused=tuple(sorted(fields.unused())))


def _text(fields: Fields) -> Record:
    text = fields.string(("text",))
    if not text.strip():
        raise ValueError("the text is empty")
    return Record(text=text)


def _messages(fields: Fields) -> Record:
    name = fields.name_of_first(_TURNS)
    if name is None:
        raise fields.missing(_TURNS)
    return _conversation(_with_system(fields, read_turns(fields.first((name,)), fields, name)))


def _alpaca(fields: Fields) -> Record:
    asked = _instruction(fields)
    return _conversation([*_asked(fields, asked), Turn("assistant", fields.string(("output",)))])


def _qa(fields: Fields) -> Record:
    asked = fields.string(_QUESTION)
    return _conversation([*_asked(fields, asked), Turn("assistant", fields.string(_ANSWER))])


def _prompt_completion(fields: Fields) -> Record:
    """TRL's rows. Of two texts the prompt is what the user says; of a prompt that is a list of
    messages, answers are not supervised."""
    for name in _PROMPT_COMPLETION:
        if fields.name_of_first((name,)) is None:
            raise fields.missing((name,))
    prompt, completion = (fields.first((name,)) for name in _PROMPT_COMPLETION)
    for mark in ("label", "kto_tag"):
        if isinstance(fields.values.get(mark), bool) and not fields.first((mark,)):
            raise ValueError(f"{mark} is false: the completion is not one to learn")
    if isinstance(prompt, list) or holds_messages(prompt):
        turns = read_turns(prompt, fields, "prompt")
        begin = _with_system(fields, [turn._replace(supervised=False) for turn in turns])
        completion = parse_list(completion) if holds_messages(completion) else completion
    else:
        begin = _asked(fields, as_text(prompt, "the field prompt"))
    end = (
        read_turns(completion, fields, "completion")
        if isinstance(completion, list)
        else [Turn("assistant", as_text(completion, "the field completion"))]
    )
    if end[0].role != "assistant":
        raise ValueError("the completion does not begin with an answer")
    return _conversation([*begin, *end])


def _instruction(fields: Fields) -> str:
    """The instruction and the input of an Alpaca record, which may have one of the two."""
    asked = fields.string(("instruction",))
    extra = fields.first(("input",))
    extra = "" if extra is None else as_text(extra, "the field input")
    return "\n".join(part for part in (asked, extra) if part.strip())


def _asked(fields: Fields, question: str) -> list[Turn]:
    """All up to a question that is a text: system, history, the question itself."""
    if not question.strip():
        raise ValueError("the question is empty")
    turns = []
    for asked, answer in _history(fields.first(("history",))):
        turns += [Turn("user", asked), Turn("assistant", answer)]
    return _with_system(fields, [*turns, Turn("user", question)])


def _with_system(fields: Fields, turns: list[Turn]) -> list[Turn]:
    """Put the record's system prompt first; messages that begin with another one keep theirs."""
    value = fields.values.get("system")
    system = "" if value is None else as_text(value, "the field system")
    own = turns[0].content if turns[0].role == "system" else None
    if own is None or own == system:
        fields.first(("system",))
    return [Turn("system", system), *turns] if own is None and system.strip() else turns


def _history(value: Any) -> list[tuple[str, str]]:
    """History as a list of pairs; CSV files hold it as the text of a list, JSON's or Python's."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    pairs = _list_or_none(value)
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise ValueError("history is not a list of pairs")
    return [(question, reply) for question, reply in pairs]


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
    pair = _pair(*(_answered(side) for side in sides))
    apart = [side[pair.num_shared :] for side in sides]
    if any(apart) and not all(side and side[0].role == "assistant" for side in apart):
        raise ValueError("chosen and rejected are not answers to the same messages")
    return pair


def _pair_sides(fields: Fields, names: list[str]) -> list[list[Turn]]:
    """Both conversations of a pair, from their beginning."""
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
            raise ValueError("chosen and rejected are texts, and there is no prompt beside them")
        return [[*prompt, *side] if side[0].role == "assistant" else side for side in sides]
    beside = Fields(fields.values)
    prompt = _without_system(_pair_prompt(beside))
    if all(_without_system(side)[: len(prompt)] == prompt for side in sides):
        fields.used |= beside.used  # the prompt repeats what both begin with
    return [_with_system(fields, side) for side in sides]


def _pair_prompt(fields: Fields) -> list[Turn]:
    """What stands before both answers; nothing where answers begin the conversation."""
    name = fields.name_of_first((*_TURNS, *_QUESTION))
    if name is None:
        has_instruction = fields.name_of_first(("instruction",))
        return _asked(fields, _instruction(fields)) if has_instruction else []
    asked = fields.first((name,))
    if isinstance(asked, list | dict) or holds_messages(asked):
        return _with_system(fields, read_turns(asked, fields, name))
    return _asked(fields, as_text(asked, f"the field {name}"))


def _without_system(turns: list[Turn]) -> list[Turn]:
    return turns[1:] if turns and turns[0].role == "system" else turns


def _answered(turns: list[Turn]) -> list[Turn]:
    answers = [turn.content for turn in turns if turn.role == "assistant"]
    if not answers:
        raise ValueError("nobody answers in the conversation")
    if not all(answer.strip() for answer in answers):
        raise ValueError("an answer is empty")
    return turns


def _conversation(turns: list[Turn]) -> Record:
    return Record(messages=_as_messages(_answered(turns)), unsupervised=_marks([turns]))


def _pair(chosen: list[Turn], rejected: list[Turn]) -> Record:
    return Record(
        chosen=_as_messages(chosen),
        rejected=_as_messages(rejected),
        unsupervised=_marks([chosen, rejected]),
    )


def _as_messages(turns: list[Turn]) -> list[Message]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _marks(sides: list[list[Turn]]) -> tuple[frozenset[int], ...]:
    """Which answers of each conversation are not supervised; nothing if all are."""
    marks = tuple(
        frozenset(
            number
            for number, turn in enumerate(side)
            if turn.role == "assistant" and not turn.supervised
        )
        for side in sides
    )
    return marks if any(marks) else ()


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
