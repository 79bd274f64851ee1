import json
from typing import Any, get_args

import pytest

from minimind.config.settings import SchemaName
from minimind.data.schemas import (
    SCHEMAS,
    Record,
    convert,
    detect_schema,
    split_packed,
    substitute_variables,
    variables_in,
)

TURNS = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
REFUSAL = [TURNS[0], {"role": "assistant", "content": "不知道"}]
FIRST = [{"role": "user", "content": "早"}, {"role": "assistant", "content": "早上好"}]
SYSTEM = {"role": "system", "content": "简短"}

KNOWN: list[tuple[str, dict[str, Any], Record]] = [
    ("text", {"text": "文", "meta": {}}, Record(text="文")),
    ("conversations", {"conversations": TURNS}, Record(messages=TURNS)),
    ("conversations", {"conversation": TURNS, "system": "简短"}, Record(messages=[SYSTEM, *TURNS])),
    ("messages", {"messages": [SYSTEM, *TURNS], "system": "x"}, Record(messages=[SYSTEM, *TURNS])),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "问"}, {"from": "GPT", "value": "答"}]},
        Record(messages=TURNS),
    ),
    ("alpaca", {"instruction": "问", "input": "", "output": "答"}, Record(messages=TURNS)),
    ("alpaca", {"instruction": "", "input": "问", "output": "答"}, Record(messages=TURNS)),
    (
        "alpaca",
        {"instruction": "译", "input": "河", "output": "river", "text": "all of it again"},
        Record(
            messages=[
                {"role": "user", "content": "译\n河"},
                {"role": "assistant", "content": "river"},
            ]
        ),
    ),
    (
        "alpaca",
        {"instruction": "问", "input": None, "output": "答", "history": [["早", "早上好"]]},
        Record(messages=[*FIRST, *TURNS]),
    ),
    ("qa", {"q": "问", "a": "答", "history": "[]"}, Record(messages=TURNS)),
    ("qa", {"q": "问", "a": "答", "history": ""}, Record(messages=TURNS)),
    (
        "qa",
        {"q": "问", "a": "答", "history": '[["早", "早上好"]]'},
        Record(messages=[*FIRST, *TURNS]),
    ),
    (
        "qa",
        {"q": "问", "a": "答", "history": " [['早', '早上好']] "},
        Record(messages=[*FIRST, *TURNS]),
    ),
    (
        "qa",
        {"q": "问", "a": "答", "history": "[('早', '早上好')]"},
        Record(messages=[*FIRST, *TURNS]),
    ),
    (
        "qa",
        {"q": "问", "a": "答", "history": r"[['早', '\d']]"},
        Record(messages=[FIRST[0], {"role": "assistant", "content": r"\d"}, *TURNS]),
    ),
    ("qa", {"question": "问", "answer": "答"}, Record(messages=TURNS)),
    (
        "qa",
        {"prompt": "问", "response": "答", "system": "简短"},
        Record(messages=[SYSTEM, *TURNS]),
    ),
    ("prompt_completion", {"prompt": "问", "completion": "答"}, Record(messages=TURNS)),
    ("pairs", {"chosen": TURNS, "rejected": REFUSAL}, Record(chosen=TURNS, rejected=REFUSAL)),
    (
        "pairs",
        {"prompt": "问", "chosen": TURNS, "rejected": REFUSAL},
        Record(chosen=TURNS, rejected=REFUSAL),
    ),
    (
        "pairs",
        {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": REFUSAL[1:]},
        Record(chosen=TURNS, rejected=REFUSAL),
    ),
    (
        "pairs",
        {
            "conversations": [{"from": "human", "value": "问"}],
            "chosen": {"from": "gpt", "value": "答"},
            "rejected": {"from": "gpt", "value": "不知道"},
        },
        Record(chosen=TURNS, rejected=REFUSAL),
    ),
    *(
        (
            "pairs",
            {prompt: "问", chosen: "答", rejected: "不知道"},
            Record(chosen=TURNS, rejected=REFUSAL),
        )
        for prompt in ("prompt", "question", "q")
        for chosen in ("chosen", "chose")
        for rejected in ("rejected", "reject")
    ),
]


PARTS = [{"type": "text", "text": "长"}, {"type": "text", "text": "江"}]
LATER = [{"role": "user", "content": "再说"}, {"role": "assistant", "content": "好"}]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "加一", "input": 21, "output": 22}, ["加一\n21", "22"]),
        ({"messages": [{"role": "user", "content": PARTS}, TURNS[1]]}, ["长江", "答"]),
        ({"messages": json.dumps(TURNS)}, ["问", "答"]),
        ({"messages": repr(TURNS)}, ["问", "答"]),
        ({"conversations": json.dumps([{"from": "human", "value": "问"}, TURNS[1]])}, ["问", "答"]),
        ({"prompt": "问", "completion": "答"}, ["问", "答"]),
        ({"prompt": "问", "completion": 4, "system": "简短"}, ["简短", "问", "4"]),
        ({"prompt": "写 JSON", "completion": json.dumps(TURNS)}, ["写 JSON", json.dumps(TURNS)]),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, ["问", "答"]),
        ({"prompt": TURNS[:1], "completion": "答"}, ["问", "答"]),
        ({"prompt": json.dumps(TURNS[:1]), "completion": json.dumps(TURNS[1:])}, ["问", "答"]),
        ({"prompt": [SYSTEM, TURNS[0]], "completion": TURNS[1:]}, ["简短", "问", "答"]),
        ({"prompt": "问", "completion": "答", "label": True}, ["问", "答"]),
        (
            {"prompt": TURNS[:1], "system": "简短", "chosen": "答", "rejected": "不"},
            ["简短", "问", "答", "不"],
        ),
        ({"system": "简短", "chosen": TURNS, "rejected": REFUSAL}, ["简短", "问", "答", "不知道"]),
        (
            {"question": "问", "history": [["早", "好"]], "chosen": "答", "rejected": "不"},
            ["早", "好", "问", "答", "不"],
        ),
        (
            {"instruction": "译", "input": "河", "chosen": "a", "rejected": "b"},
            ["译\n河", "a", "b"],
        ),
        (
            {"prompt": "问", "chosen": json.dumps(TURNS), "rejected": json.dumps(REFUSAL)},
            ["问", "答", "不知道"],
        ),
        ({"prompt": json.dumps(TURNS[:1]), "chosen": "答", "rejected": "不"}, ["问", "答", "不"]),
    ],
)
def test_other_layouts_and_types_are_read_completely(
    record: dict[str, Any], expected: list[str]
) -> None:
    converted = convert(record)
    assert converted.texts == expected
    assert converted.unused == ()


@pytest.mark.parametrize(
    ("record", "unused"),
    [
        ({"text": "文", "id": 0, "note": None, "tags": [], "more": {"a": None}, "b": " "}, ["id"]),
        ({"instruction": "问", "output": "答", "text": "all of it"}, ["text"]),
        ({"messages": [SYSTEM, *TURNS], "system": "另一个"}, ["system"]),
        ({"messages": [SYSTEM, *TURNS], "system": "简短"}, []),
        (
            {
                "messages": [TURNS[0] | {"name": "李雷", "x": 1}, TURNS[1]],
                "parallel_tool_calls": True,
            },
            ["messages[].name", "messages[].x", "parallel_tool_calls"],
        ),
        ({"messages": [TURNS[0] | {"from": "human"}, TURNS[1]]}, ["messages[].from"]),
        (
            {"messages": [{"role": "user", "content": [PARTS[0] | {"cache": 1}]}, TURNS[1]]},
            ["messages[].content[].cache"],
        ),
        ({"prompt": "问", "chosen": TURNS, "rejected": REFUSAL}, []),
        ({"prompt": TURNS[:1], "chosen": TURNS, "rejected": REFUSAL}, []),
        ({"prompt": "别的", "chosen": TURNS, "rejected": REFUSAL}, ["prompt"]),
        ({"prompt": "问", "chosen": "答", "rejected": "不", "score": 0.5}, ["score"]),
        ({"prompt": "问", "completion": "答", "label": "math"}, ["label"]),
        ({"q": "问", "a": "答", "question": "还有"}, ["question"]),
        ({"messages": "broken", "text": "文"}, ["messages"]),
    ],
)
def test_unused_keys_are_recorded(record: dict[str, Any], unused: list[str]) -> None:
    assert list(convert(record).unused) == unused


@pytest.mark.parametrize(
    ("mark", "supervised"),
    [
        ({"weight": 0}, False),
        ({"weight": 1}, True),
        ({"weight": 0.0}, False),
        ({"loss": False}, False),
        ({"loss": True}, True),
        ({"loss": None}, True),
        ({"train": False}, False),
        ({"training": False}, False),
        ({"loss_mask": 0}, False),
        ({"mask": True}, False),
        ({"mask": 1}, False),
        ({"mask": False, "weight": 1}, True),
        ({}, True),
    ],
)
def test_supervision_marks_of_messages_are_respected(
    mark: dict[str, Any], supervised: bool
) -> None:
    fields = {"system": "简短", "messages": [TURNS[0], TURNS[1] | mark, *LATER]}
    record = convert(fields)
    assert record.messages == [SYSTEM, *TURNS, *LATER]
    assert record.unused == ()
    assert record.unsupervised == (() if supervised else (frozenset({2}),))
    [(messages, excluded)] = record.conversations
    assert (messages, excluded) == (record.messages, frozenset() if supervised else {2})
    assert record.substitute({"name": "x"}).unsupervised == record.unsupervised


def test_answers_in_a_prompt_are_not_supervised() -> None:
    record = convert({"prompt": [*TURNS, LATER[0]], "completion": LATER[1:]})
    assert record.conversations == [([*TURNS, *LATER], frozenset({1}))]
    pair = convert({"prompt": [*TURNS, LATER[0]], "chosen": "好", "rejected": "不"})
    assert [excluded for _, excluded in pair.conversations] == [{0, 1, 2}] * 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tool_calls", [{"id": "1"}]),
        ("tools", [{"type": "function"}]),
        ("function_call", {"name": "f"}),
        ("functions", "[{}]"),
        ("reasoning_content", "嗯"),
        ("images", ["a.png"]),
    ],
)
def test_unsupported_keys_are_rejected_unless_they_are_empty(key: str, value: Any) -> None:
    for record in (
        {"messages": [TURNS[0], TURNS[1] | {key: value}]},
        {"messages": TURNS, key: value},
        {"instruction": "问", "output": "答", key: value},
        {"prompt": [TURNS[0]], "chosen": [TURNS[1] | {key: value}], "rejected": REFUSAL[1:]},
    ):
        with pytest.raises(ValueError, match=rf"{key}: (the chat format has no|only text is)"):
            convert(record)
    for empty in (None, [], "", {}, "[]", {"name": None}):
        converted = convert({"messages": [TURNS[0], TURNS[1] | {key: empty}], key: empty})
        assert (converted.messages, converted.unused) == (TURNS, ())
    assert convert({"text": "文", key: value}).unused == (key,), "not a conversation"


@pytest.mark.parametrize(("schema", "record", "expected"), KNOWN)
def test_schemas_are_detected_and_can_be_given_by_name(
    schema: str, record: dict[str, Any], expected: Record
) -> None:
    assert detect_schema(record) == schema
    for name in ("auto", schema):
        converted = convert(json.loads(json.dumps(record)), name)
        assert converted == expected
        assert converted.schema == schema


def test_the_setting_lists_the_same_schemas() -> None:
    assert get_args(SchemaName) == ("auto", *SCHEMAS)
    assert {schema for schema, _, _ in KNOWN} == set(SCHEMAS)


@pytest.mark.parametrize(
    ("schema", "record", "reason"),
    [
        ("auto", {"title": "x", "url": "y"}, "unknown schema; its fields are: title, url"),
        ("auto", {}, "its fields are: none"),
        ("auto", {"text": " \n"}, "the text is empty"),
        ("auto", {"text": None}, "the field text or content is not text"),
        ("auto", {"messages": []}, "the list of messages is empty"),
        ("auto", {"conversations": ["问", "答"]}, "messages are not a list of objects"),
        ("auto", {"conversations": TURNS[:1]}, "no assistant message"),
        ("auto", {"messages": [*TURNS, {"role": "bard", "content": "x"}]}, "unknown role 'bard'"),
        ("auto", {"messages": [{"content": "x"}]}, "unknown role None; supported are human, gpt"),
        ("auto", {"messages": [TURNS[0], {"role": "assistant"}]}, "assistant message has no text"),
        ("auto", {"messages": [TURNS[0], {"role": "gpt", "content": "\n"}]}, "an answer is empty"),
        ("auto", {"instruction": "问", "output": ""}, "an answer is empty"),
        (
            "auto",
            {"instruction": "问", "output": 3.5},
            "the field output is not text, but a number",
        ),
        ("auto", {"instruction": " ", "input": "", "output": "答"}, "the question is empty"),
        (
            "auto",
            {"chosen": TURNS, "rejected": [{"role": "user", "content": "别的"}, TURNS[1]]},
            "chosen and rejected are not answers to the same messages",
        ),
        ("auto", {"chosen": TURNS, "rejected": TURNS * 2}, "not answers to the same messages"),
        ("auto", {"q": "问", "a": "答", "history": "[1]"}, "history is not a list of pairs"),
        ("auto", {"q": "问", "a": "答", "history": "import os"}, "history is not a list of pairs"),
        ("auto", {"q": "问", "a": "答", "history": "[" * 9_999}, "history is not a list of pairs"),
        ("auto", {"q": "问", "a": "答", "history": [["早"]]}, "history is not a list of pairs"),
        ("auto", {"q": "问", "a": "答", "history": {"早": "好"}}, "history is not a list of pairs"),
        ("auto", {"q": "问", "a": "答", "history": [["早", ""]]}, "an answer is empty"),
        ("auto", {"chosen": "答", "rejected": "不"}, "there is no prompt field"),
        ("auto", {"prompt": "问", "chosen": "答", "rejected": ""}, "an answer is empty"),
        ("auto", {"prompt": "问", "chosen": 1.5, "rejected": 2}, "the field chosen is not text"),
        (
            "auto",
            {"instruction": "问", "input": ["x"], "output": "答"},
            "the field input is not text, but a list",
        ),
        (
            "auto",
            {"instruction": "问", "system": ["x"], "output": "答"},
            "the field system is not text",
        ),
        (
            "auto",
            {"instruction": "问", "output": ["答"]},
            "the field output is not text, but a list",
        ),
        ("auto", {"instruction": "问", "output": True}, "but true or false"),
        ("auto", {"instruction": ["问"], "output": "答"}, "the field instruction is not text"),
        ("auto", {"messages": TURNS, "system": {"text": "x"}}, "system is not text, but an object"),
        ("auto", {"messages": "[{broken"}, "neither JSON nor Python"),
        ("auto", {"messages": {"role": "user"}}, "a user message has no text"),
        ("auto", {"messages": 3}, "messages are not a list of objects"),
        (
            "auto",
            {"messages": [TURNS[0], {"role": "tool", "content": "x"}]},
            "a tool message: the chat",
        ),
        (
            "auto",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "type 'image_url': only text",
        ),
        (
            "auto",
            {"messages": [{"role": "user", "content": ["x"]}]},
            "is not an object with type and text",
        ),
        (
            "auto",
            {"messages": [{"role": "user", "content": {"text": "x"}}]},
            "is not text, but an object",
        ),
        ("auto", {"messages": [TURNS[0], TURNS[1] | {"weight": 0.5}]}, "a message has weight: 0.5"),
        ("auto", {"messages": [TURNS[0], TURNS[1] | {"loss": "no"}]}, "a message has loss: 'no'"),
        ("auto", {"messages": [TURNS[0], TURNS[1] | {"loss": True, "mask": 1}]}, "contradict"),
        (
            "auto",
            {"messages": [TURNS[0] | {"train": True}, TURNS[1]]},
            "train: includes a user message in the loss",
        ),
        (
            "auto",
            {"messages": [TURNS[0], TURNS[1] | {"thinking": "嗯"}]},
            "messages[].thinking: the chat",
        ),
        ("auto", {"prompt": "问", "completion": "答", "label": False}, "label is false"),
        ("auto", {"prompt": TURNS, "completion": TURNS}, "does not begin with an answer"),
        ("auto", {"prompt": 0.5, "completion": "答"}, "the field prompt is not text"),
        ("prompt_completion", {"prompt": "问"}, "no field completion; its fields are: prompt"),
        ("auto", {"messages": json.dumps([TURNS[0], {"role": "gpt", "content": "\0"}])}, "NUL"),
        ("text", {"messages": TURNS}, "no field text or content; its fields are: messages"),
        ("text", {"q": "问", "a": "答"}, "no field text or content; its fields are: q, a"),
        ("messages", {"text": "文"}, "no field messages or conversations or conversation"),
        ("sharegpt", {"text": "文"}, "no field messages or conversations"),
        ("alpaca", {"instruction": "问"}, "no field output; its fields are: instruction"),
        ("qa", {"text": "文"}, "no field q or question or prompt; its fields are: text"),
        ("pairs", {"chosen": TURNS}, "no field rejected or reject; its fields are: chosen"),
    ],
)
def test_invalid_records_give_the_reason(schema: str, record: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        convert(record, schema)
    assert reason in str(caught.value)


def test_texts_and_kind_of_a_record() -> None:
    assert Record(text="文").texts == ["文"]
    pair = Record(chosen=TURNS, rejected=REFUSAL)
    assert pair.texts == ["问", "答", "不知道"]
    assert pair.as_text() == "问\n答\n不知道"
    assert [record.kind for record in (Record(text=""), Record(messages=TURNS), pair)] == [
        *("text", "messages", "pair")
    ]


def test_pairs_of_a_prompt_are_in_one_split() -> None:
    first, second = (
        Record(chosen=[*TURNS[:1], {"role": "assistant", "content": text}], rejected=REFUSAL)
        for text in "ab"
    )
    assert first.split_key() == second.split_key()
    without = [Record(chosen=[{"role": "assistant", "content": t}], rejected=[]) for t in "ab"]
    assert without[0].split_key() != without[1].split_key()


@pytest.mark.parametrize("text", ["[{[1, 2]: 3}]", "[{[1]}]", "[{{...}}]"])
def test_python_that_is_no_list_is_an_invalid_record(text: str) -> None:
    with pytest.raises(ValueError, match="neither JSON nor Python"):
        convert({"messages": text})


def test_fingerprints_depend_on_texts_and_roles() -> None:
    swapped = [
        {**one, "role": other["role"]} for one, other in zip(TURNS, TURNS[::-1], strict=True)
    ]
    records = [
        Record(text="问"),
        Record(text="问\n答"),
        Record(messages=TURNS),
        Record(messages=swapped),
        Record(messages=[*FIRST, *TURNS]),
        Record(chosen=TURNS, rejected=REFUSAL),
    ]
    assert len({record.fingerprint() for record in records}) == len(records)
    again = convert({"q": "问", "a": "答"})
    assert again.fingerprint() == Record(messages=TURNS).fingerprint()
    assert all(0 <= record.fingerprint() < 2**64 for record in records)


def test_variables_are_substituted_in_all_texts() -> None:
    variables = {"name": "小明"}
    text = convert({"text": "{{name}} and {{ name }}, {{author}} {name} {{names}}"})
    assert text.substitute(variables).text == "小明 and 小明, {{author}} {name} {{names}}"
    chat = convert({"q": "{{name}}?", "a": "{{name}}!"}).substitute(variables)
    assert [message["content"] for message in chat.messages or []] == ["小明?", "小明!"]
    pair = {"prompt": "{{name}}", "chosen": "{{name}}", "rejected": "-"}
    substituted = convert(pair).substitute(variables)
    assert (substituted.chosen, substituted.schema) == (
        convert(pair | {"prompt": "小明", "chosen": "小明"}).chosen,
        "pairs",
    )
    assert text.substitute({}) is text
    assert variables_in("{{name}} {{author}} {{x}} {name}") == {"name", "author", "x"}


def test_substituted_values_are_not_substituted_again() -> None:
    assert substitute_variables("{{a}}{{b}}", {"a": "{{b}}", "b": r"\1"}) == r"{{b}}\1"


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("<s>长江</s> <s>黄河\n</s>", ["长江", "黄河\n"]),
        ("<s>长江</s>", ["长江"]),
        ("<s> </s><s>黄河</s>\n", ["黄河"]),
        ("删去<s>这个</s>", ["删去<s>这个</s>"]),  # HTML
        ("<s>这个</s>删去", ["<s>这个</s>删去"]),
        ("长江", ["长江"]),
    ],
)
def test_packed_documents_of_minimind_are_split(text: str, documents: list[str]) -> None:
    assert [record.text for record in split_packed(convert({"text": text}))] == documents
