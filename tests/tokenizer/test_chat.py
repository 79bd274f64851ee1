import random
from pathlib import Path
from typing import Any

import pytest

from minimind.data.schemas import convert
from minimind.tokenizer import SPECIAL_TOKENS, Tokenizer
from minimind.tokenizer.chat import Message, encode_chat, encode_chats, validate_messages
from minimind.tokenizer.format import ROLES

FRAGMENTS = [
    *SPECIAL_TOKENS,
    *("<|", "|>", "<", "|", ">", "</", "im_start", "im_end", "im_", "endoftext", "reserved_0"),
    *("think", "tool_call", "tool_response", *ROLES, "\n", " ", "\r\n", "<s>", "<0x0A>", "Ċ"),
    *("你好", "end", "＜|im_end|＞", "\u200b"),
]


def hostile_strings(seed: int, num_strings: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(FRAGMENTS, k=rng.randrange(1, 12))) for _ in range(num_strings)]


def control_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [i for i in ids if i in tokenizer.special_ids]


def label_text(tokenizer: Tokenizer, messages: list[Message]) -> str:
    ids, mask = encode_chat(tokenizer, messages)
    return tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])


def conversation(*contents: str) -> list[Message]:
    """Make messages that alternate between user and assistant."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


def test_the_format(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "你是助手"}, *conversation("你好", "好的。")]
    ids, mask = encode_chat(tokenizer, messages)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\n你是助手<|im_end|>\n"
        "<|im_start|>user\n你好<|im_end|>\n"
        "<|im_start|>assistant\n好的。<|im_end|>\n"
    )
    assert len(ids) == len(mask)


def test_the_generation_prompt(tokenizer: Tokenizer) -> None:
    messages = conversation("你好")
    ids, mask = encode_chat(tokenizer, messages, add_generation_prompt=True)
    assert tokenizer.decode(ids) == "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    assert mask == [0] * len(ids)


def test_only_answers_and_their_end_tokens_are_supervised(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "S"},
        *conversation("问一", "答一", "问二", ""),
        {"role": "tool", "content": "T"},
        {"role": "assistant", "content": "答三\n"},
    ]
    assert label_text(tokenizer, messages) == "答一<|im_end|><|im_end|>答三\n<|im_end|>"


@pytest.mark.parametrize("answer", ["好", "\n好", "\n\n\n", "  \n 好", "", " 好", "\r\n"])
def test_a_training_example_starts_with_the_ids_of_the_prompt(
    tokenizer: Tokenizer, answer: str
) -> None:
    prompt, _ = encode_chat(tokenizer, conversation("你好"), add_generation_prompt=True)
    ids, mask = encode_chat(tokenizer, conversation("你好", answer))
    assert ids[: len(prompt)] == prompt
    assert mask.index(1) == len(prompt)
    assert label_text(tokenizer, conversation("你好", answer)) == f"{answer}<|im_end|>"


def test_a_batch_is_encoded_like_single_conversations(tokenizer: Tokenizer) -> None:
    many = [conversation("一", "二"), conversation("三", "四", "五"), conversation("\n六")]
    assert encode_chats(tokenizer, many) == [encode_chat(tokenizer, messages) for messages in many]
    assert encode_chats(tokenizer, []) == []


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))]
)
def test_messages_cannot_contain_control_tokens(tokenizer: Tokenizer, seed: int) -> None:
    strings = hostile_strings(seed, 5_000)  # 100,000 with the slow tests
    chats = [[{"role": role, "content": text} for role in ROLES] for text in strings]
    frame = [tokenizer.im_start, tokenizer.im_end]
    for text, (ids, mask) in zip(strings, encode_chats(tokenizer, chats), strict=True):
        assert control_ids(tokenizer, ids) == frame * len(ROLES)
        contents = "".join(f"{role}\n{text}\n" for role in ROLES)
        assert tokenizer.decode(ids, skip_special_tokens=True) == contents
        labels = [i for i, m in zip(ids, mask, strict=True) if m]
        assert labels[-1] == tokenizer.im_end
        assert tokenizer.decode(labels[:-1]) == text


def _records(text: str) -> list[dict[str, Any]]:
    """Put the text into each field of each schema, and into the system prompt."""
    turns = conversation(text, text)
    call = f'{{"name": "{text}", "arguments": {{"{text}": "{text}"}}}}'
    return [
        {"conversations": turns},
        {"messages": [{"role": "system", "content": call}, *turns]},
        {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]},
        {"instruction": text, "input": text, "output": text},
        {"q": text, "a": text, "history": [[text, text]]},
    ]


def test_data_fields_cannot_contain_control_tokens(tokenizer: Tokenizer) -> None:
    frame = [tokenizer.im_start, tokenizer.im_end]
    chats: list[list[Message]] = []
    for text in hostile_strings(20, 1_000):
        if text.strip():
            chats += [convert(record, "auto").messages or [] for record in _records(text)]
    assert len(chats) > 4_000
    for messages, (ids, _) in zip(chats, encode_chats(tokenizer, chats), strict=True):
        assert control_ids(tokenizer, ids) == frame * len(messages)
        assert len(messages) >= 2


def test_documents_cannot_contain_control_tokens(tokenizer: Tokenizer) -> None:
    for ids in tokenizer.encode_batch(hostile_strings(21, 5_000)):
        assert not control_ids(tokenizer, ids)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        (["你好"], "message 1 is not an object"),
        ([{"content": "你好"}], "message 1 has the unknown role None"),
        ([{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}], "message 2 .*'bot'"),
        ([{"role": "<|im_end|>", "content": "a"}], "supported are system, user, assistant, tool"),
        ([{"role": "user"}], r"message 1 \(user\): content is not text"),
        ([{"role": "user", "content": ["a"]}], r"message 1 \(user\): content is not text"),
    ],
)
def test_invalid_conversations_are_refused(
    tokenizer: Tokenizer, messages: Any, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        validate_messages(messages)
    with pytest.raises(ValueError, match=reason):
        encode_chat(tokenizer, messages)


ORDINARY = [
    "你好",
    "",
    "长江在哪里？\n泰山呢？",
    "  前面有空格，后面也有  ",
    "\n第一行是空的",
    "\n\n\n",
    " \n \t\n前面有几种空白",
    "最后有空行\n\n",
    "\r\nWindows\r\n",
    "It's 1,234.5 km — isn't it? 🐼👩‍👩‍👧‍👦",
    "def f(x):\n    return x\n",
    "{{ message }} {% raw %} <b>&amp;</b> 'quoted' \"too\" \\n",
    "e\u0301 ﬁ Ａ",  # a normalizer would change these
]


def test_the_chat_template_gives_the_same_ids(tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    rng = random.Random(0)
    answers = [text for text in ORDINARY if text.lstrip(" \t") == text.lstrip()]
    assert len(answers) == len(ORDINARY) - 4
    for _ in range(100):
        messages = [
            {"role": role, "content": rng.choice(answers if role == "assistant" else ORDINARY)}
            for role in rng.choices(ROLES, k=rng.randrange(1, 7))
        ]
        for prompt in (False, True):
            ids, _ = encode_chat(tokenizer, messages, add_generation_prompt=prompt)
            assert ids == theirs.apply_chat_template(
                messages, tokenize=True, return_dict=False, add_generation_prompt=prompt
            )
            rendered = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            assert tokenizer.decode(ids) == rendered


def test_transformers_loads_the_directory(tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.im_end, tokenizer.end_of_text)
    assert theirs.bos_token_id is None
    assert len(theirs) == tokenizer.vocab_size
    for text in ORDINARY:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
