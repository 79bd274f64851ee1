import json
from typing import Any, get_args

import pytest

from minimind.config.settings import SCHEMAS as SETTING
from minimind.data.schemas import SCHEMAS, Record, convert, detect_schema, fill_in, placeholders

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


@pytest.mark.parametrize(("schema", "record", "expected"), KNOWN)
def test_known_schemas_are_recognised_and_can_be_named(
    schema: str, record: dict[str, Any], expected: Record
) -> None:
    assert detect_schema(record) == schema
    for name in ("auto", schema):
        converted = convert(json.loads(json.dumps(record)), name)
        assert converted == expected
        assert converted.schema == schema


def test_the_setting_knows_the_same_schemas() -> None:
    assert get_args(SETTING) == ("auto", *SCHEMAS)
    assert {schema for schema, _, _ in KNOWN} == set(SCHEMAS)


@pytest.mark.parametrize(
    ("schema", "record", "reason"),
    [
        ("auto", {"title": "x", "url": "y"}, "of no known schema; its fields are: title, url"),
        ("auto", {}, "its fields are: none"),
        ("auto", {"text": " \n"}, "the text is empty"),
        ("auto", {"text": None}, "the field text is not text"),
        ("auto", {"messages": []}, "the list of messages is empty"),
        ("auto", {"conversations": ["问", "答"]}, "messages are not a list of objects"),
        ("auto", {"conversations": TURNS[:1]}, "nobody answers"),
        ("auto", {"messages": [*TURNS, {"role": "bard", "content": "x"}]}, "unknown role 'bard'"),
        ("auto", {"messages": [{"content": "x"}]}, "unknown role None; known are human, gpt"),
        ("auto", {"messages": [TURNS[0], {"role": "assistant"}]}, "the assistant holds no text"),
        ("auto", {"messages": [TURNS[0], {"role": "gpt", "content": "\n"}]}, "an answer is empty"),
        ("auto", {"instruction": "问", "output": ""}, "an answer is empty"),
        ("auto", {"instruction": "问", "output": 3}, "the field output is not text"),
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
        ("auto", {"chosen": "答", "rejected": "不"}, "there is no prompt beside them"),
        ("auto", {"prompt": "问", "chosen": "答", "rejected": ""}, "an answer is empty"),
        ("auto", {"prompt": "问", "chosen": 1, "rejected": 2}, "messages are not a list"),
        ("text", {"messages": TURNS}, "no field text; its fields are: messages"),
        ("text", {"q": "问", "a": "答"}, "no field text; its fields are: q, a"),
        ("messages", {"text": "文"}, "no field messages or conversations or conversation"),
        ("sharegpt", {"text": "文"}, "no field messages or conversations"),
        ("alpaca", {"instruction": "问"}, "no field output; its fields are: instruction"),
        ("qa", {"text": "文"}, "no field q or question or prompt; its fields are: text"),
        ("pairs", {"chosen": TURNS}, "no field rejected or reject; its fields are: chosen"),
    ],
)
def test_what_is_no_record_is_refused_with_the_reason(
    schema: str, record: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError) as caught:
        convert(record, schema)
    assert reason in str(caught.value)


def test_what_is_written_in_a_record() -> None:
    assert Record(text="文").texts == ["文"]
    pair = Record(chosen=TURNS, rejected=REFUSAL)
    assert pair.texts == ["问", "答", "不知道"]
    assert pair.as_text() == "问\n答\n不知道"
    assert [record.kind for record in (Record(text=""), Record(messages=TURNS), pair)] == [
        *("text", "messages", "pair")
    ]


def test_fingerprints_tell_records_apart_by_what_is_written() -> None:
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


def test_placeholders_are_filled_wherever_something_is_written() -> None:
    fill = {"name": "小明"}
    text = convert({"text": "{{name}} and {{ name }}, {{author}} {name} {{names}}"})
    assert text.filled(fill).text == "小明 and 小明, {{author}} {name} {{names}}"
    talk = convert({"q": "{{name}}?", "a": "{{name}}!"}).filled(fill)
    assert [message["content"] for message in talk.messages or []] == ["小明?", "小明!"]
    pair = {"prompt": "{{name}}", "chosen": "{{name}}", "rejected": "-"}
    filled = convert(pair).filled(fill)
    assert (filled.chosen, filled.schema) == (
        convert(pair | {"prompt": "小明", "chosen": "小明"}).chosen,
        "pairs",
    )
    assert text.filled({}) is text
    assert placeholders("{{name}} {{author}} {{x}} {name}") == {"name", "author", "x"}


def test_what_is_filled_in_is_not_looked_at_again() -> None:
    assert fill_in("{{a}}{{b}}", {"a": "{{b}}", "b": r"\1"}) == r"{{b}}\1"
