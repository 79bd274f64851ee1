"""Record schemas of the datasets in the registry."""

from minimind.data.schemas import convert


def test_records_of_registered_datasets_are_read() -> None:
    """Hand-made records with the fields that each dataset in the registry has."""
    turns = [{"from": "human", "value": "问"}, {"from": "assistant", "value": "答"}]
    chat = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    preferred = {"from": "gpt", "value": "好"}
    other = {"from": "gpt", "value": "坏"}
    for fields, schema, texts in [
        ({"id": "1", "url": "u", "title": "长江", "text": "文"}, "text", ["文"]),  # wikipedia-zh
        ({"content": "文", "score": 0.9, "source": "web"}, "text", ["文"]),  # ultra-fineweb-zh
        ({"text": "文", "score": 0.9, "source": "web"}, "text", ["文"]),  # fineweb-edu-zh
        ({"id": 1, "conversations": turns}, "sharegpt", ["问", "答"]),  # belle-3.5m
        ({"instruction": "问", "input": "", "output": "答"}, "alpaca", ["问", "答"]),  # belle-2m
        (  # deepctrl-sft
            {"id": 1, "instruction": "", "input": "问", "output": "答", "history": [["先", "后"]]},
            "alpaca",
            ["先", "后", "问", "答"],
        ),
        (  # coig-cqia
            {"instruction": "问", "input": "", "output": "答", "task_type": {"major": ["问答"]}},
            "alpaca",
            ["问", "答"],
        ),
        (
            {"prompt": "问", "prompt_id": "7", "messages": chat},
            "messages",
            ["问", "答"],
        ),  # ultrachat
        (  # magpie-zh
            {
                "conversations": turns,
                "instruction": "问",
                "response": "答",
                "input_quality": "good",
            },
            "sharegpt",
            ["问", "答"],
        ),
        ({"history": "[['先', '后']]", "q": "问", "a": "答"}, "qa", ["先", "后", "问", "答"]),  # v1
        (  # dpo-en-zh
            {"conversations": turns[:1], "chosen": preferred, "rejected": other},
            "pairs",
            ["问", "好", "坏"],
        ),
        ({"prompt": "问", "chosen": "好", "rejected": "坏"}, "pairs", ["问", "好", "坏"]),  # huozi
        (  # minimind dpo
            {"chosen": chat, "rejected": [chat[0], {"role": "assistant", "content": "坏"}]},
            "pairs",
            ["问", "答", "坏"],
        ),
    ]:
        record = convert(fields)
        assert (record.schema, record.texts) == (schema, texts)
