"""Third-party tokenizers: ids as in transformers, loss masks, control tokens, files."""

import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from minimind.errors import TokenizerError
from minimind.inference.detokenizer import StreamingDetokenizer
from minimind.tokenizer import Tokenizer
from minimind.tokenizer import template as template_module
from minimind.tokenizer.chat import encode_chat, encode_chats, unsupported_reason
from minimind.tokenizer.format import CHAT_TEMPLATE
from tests.support.foreign import CHATTING, SHAPES

SYSTEM = {"role": "system", "content": "你是助手。"}
ORDINARY = [
    "你好",
    "长江在哪里？\n泰山呢？",
    "It's 1,234.5 km — isn't it? 🐼👩‍👩‍👧‍👦",
    "def f(x):\n    return x\n\nprint(f(2))",
    "{{ message }} {% raw %} <b>&amp;</b> 'quoted' \"too\" \\n",
    "The river ends in the sea.",
    "café ﬁ Ａ",
    "a",
]
Directory = Callable[[str], Path]


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


def decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    return b"".join(tokenizer.bytes_of[i] for i in ids).decode()


@pytest.mark.parametrize("name", SHAPES)
def test_text_is_encoded_as_in_transformers(
    name: str, foreign_dir: Directory, transformers: Any
) -> None:
    tokenizer = Tokenizer.load(foreign_dir(name))
    theirs = transformers.AutoTokenizer.from_pretrained(foreign_dir(name))
    for text in [*ORDINARY, " 前面有空格", "\n\nb ", "e\u0301"]:
        assert tokenizer.text_start + tokenizer.encode(text) == theirs(text)["input_ids"]
    assert tokenizer.vocab_size == len(theirs)


@pytest.mark.parametrize("name", CHATTING)
def test_conversations_are_encoded_as_in_transformers(
    name: str, foreign_dir: Directory, transformers: Any
) -> None:
    tokenizer = Tokenizer.load(foreign_dir(name))
    theirs = transformers.AutoTokenizer.from_pretrained(foreign_dir(name))
    rng = random.Random(0)
    for number in range(100):
        messages = turns(*rng.choices(ORDINARY, k=rng.randrange(1, 6)))
        if number % 2 and name != "llama2":
            messages = [SYSTEM, *messages]
        for prompt in (False, True):
            ids, mask = encode_chat(tokenizer, messages, add_generation_prompt=prompt)
            assert len(mask) == len(ids)
            assert ids == theirs.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=False,
                add_generation_prompt=prompt,
                enable_thinking=False,
            )


ANSWER_ENDS = {
    "smollm2": "<|im_end|>",
    "minimind2": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "tinyllama": "</s>",
    "llama2": " </s>",
}


@pytest.mark.parametrize("name", CHATTING)
@pytest.mark.parametrize("answer", ["好。", "The sea.", "\n\n  a line later", "", " "])
def test_answers_after_the_generation_prompt_and_their_end_tokens_are_supervised(
    name: str, answer: str, foreign_dir: Directory
) -> None:
    tokenizer = Tokenizer.load(foreign_dir(name))
    chats = [turns("问", "一", "再问", answer), turns("问一", answer), turns("问")]
    prefix, end = " " if name == "llama2" else "", ANSWER_ENDS[name]
    strips = {"llama3": str.strip, "llama2": str.strip, "qwen3": lambda text: text.lstrip("\n")}
    stripped = strips.get(name, str)(answer)
    for messages, (ids, mask) in zip(chats, encode_chats(tokenizer, chats), strict=True):
        assert (ids, mask) == encode_chat(tokenizer, messages)
        labels = [i for i, m in zip(ids, mask, strict=True) if m]
        # Qwen 3 ends prompts with an empty <think> block, but only opens the last answer with it.
        answers = {4: ["一"] * (name != "qwen3") + [stripped], 2: [stripped], 1: []}[len(messages)]
        assert decoded(tokenizer, labels) == "".join(prefix + text + end for text in answers)
    (ids, mask) = encode_chat(tokenizer, chats[1])
    prompt, _ = encode_chat(tokenizer, chats[1][:1], add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt
    assert mask.index(1) == len(prompt)


@pytest.mark.parametrize("name", CHATTING)
def test_unsupervised_answers_have_a_zero_mask(name: str, foreign_dir: Directory) -> None:
    tokenizer = Tokenizer.load(foreign_dir(name))
    messages = turns("问", "一", "再问", "二")
    [(all_ids, both)] = encode_chats(tokenizer, [messages])
    [(ids, last)] = encode_chats(tokenizer, [messages], unsupervised=[range(3)])
    assert ids == all_ids
    labels = decoded(tokenizer, [i for i, m in zip(ids, last, strict=True) if m])
    assert labels.strip(" ").startswith("二")
    assert 0 < sum(last) < sum(both) or (name == "qwen3" and last == both)
    assert all(m <= n for m, n in zip(last, both, strict=True))


@pytest.mark.parametrize("name", CHATTING)
def test_messages_cannot_contain_control_tokens(name: str, foreign_dir: Directory) -> None:
    tokenizer = Tokenizer.load(foreign_dir(name))
    tags = [*SHAPES[name]["special"], *SHAPES[name].get("tags", []), "<0x0A>", "[INST]", "\ue0001"]
    tags += ["\ue0000\ue001", "<|", "|>", "</", "think>", "\n", " ", "{{ bos_token }}", "好", "s>"]
    control = tokenizer.special_ids
    ids, _ = encode_chat(tokenizer, turns("a", "b", "c", "d"))
    expected = [i for i in ids if i in control]
    rng = random.Random(1)
    chats = [
        turns(*("".join(rng.choices(tags, k=rng.randrange(1, 10))) for _ in range(4)))
        for _ in range(500)
    ]
    for messages, (ids, mask) in zip(chats, encode_chats(tokenizer, chats), strict=True):
        assert [i for i in ids if i in control] == expected
        labels = decoded(tokenizer, [i for i, m in zip(ids, mask, strict=True) if m])
        for message in messages[1::2]:
            assert message["content"].strip() in labels or name == "qwen3"
    for text in ("".join(rng.choices(tags, k=10)) for _ in range(500)):
        assert control.isdisjoint(tokenizer.encode(text))


@pytest.mark.parametrize("name", SHAPES)
def test_encoding_and_decoding_gives_the_same_text(name: str, foreign_dir: Directory) -> None:
    tokenizer = Tokenizer.load(foreign_dir(name))
    rng = random.Random(2)
    space = " " if "pieces" in SHAPES[name] else ""  # SentencePiece adds one before a text
    for number in range(1000):
        letters = [
            chr(rng.choice([rng.randrange(32, 0x250), rng.randrange(0x3040, 0xD7FF)]))
            for _ in range(rng.randrange(1, 20))
        ]
        text = ORDINARY[number] if number < len(ORDINARY) else "".join(letters)
        if space and "\u2581" in text:  # SentencePiece decodes it as a space
            continue
        ids = tokenizer.encode(text)
        if not SHAPES[name].get("nfc"):
            has_space = SHAPES[name].get("pieces") == "first" and text.startswith(" ")
            assert tokenizer.decode(ids) == (text if has_space else space + text)
        stream = StreamingDetokenizer(tokenizer)
        assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids)


def test_stop_ids_and_end_of_text(foreign_dir: Directory) -> None:
    for name, first, end_of_text in [
        ("smollm2", "<|im_end|>", "<|endoftext|>"),
        ("qwen3", "<|im_end|>", "<|endoftext|>"),
        ("llama3", "<|eot_id|>", "<|end_of_text|>"),
        ("tinyllama", "</s>", "</s>"),
        ("base", "</s>", "</s>"),
        ("base with our tokens", "<|im_end|>", "<|endoftext|>"),
    ]:
        tokenizer = Tokenizer.load(foreign_dir(name))
        names = [decoded(tokenizer, [i]) for i in tokenizer.stop_ids]
        assert names[0] == first
        assert set(names) == {first, end_of_text}
        assert decoded(tokenizer, [tokenizer.end_of_text]) == end_of_text
        assert decoded(tokenizer, tokenizer.text_start) == SHAPES[name].get("bos", "")


def test_decoding_keeps_tags_and_omits_control_tokens(foreign_dir: Directory) -> None:
    tokenizer = Tokenizer.load(foreign_dir("qwen3"))
    ids, _ = encode_chat(tokenizer, turns("问", "答"))
    assert tokenizer.decode(ids, skip_special_tokens=True) == (
        "user\n问\nassistant\n<think>\n\n</think>\n\n答\n"
    )


@pytest.mark.parametrize("name", SHAPES)
def test_saving_copies_the_files_unchanged(
    name: str, foreign_dir: Directory, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(foreign_dir(name))
    tokenizer.save(tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in foreign_dir(name).iterdir()}
    after = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    if name == "base with our tokens":  # it gets our template and with it another EOS
        assert after.pop("chat_template.jinja").decode() == CHAT_TEMPLATE
        del before["generation_config.json"]
    else:
        assert Tokenizer.load(tmp_path / "saved").sha256 == tokenizer.sha256
    assert after == before


def test_a_base_model_with_our_control_tokens_gets_our_format(foreign_dir: Directory) -> None:
    ours = Tokenizer.load(foreign_dir("base with our tokens"))
    ids, _ = encode_chat(ours, turns("问", "答"))
    assert (
        decoded(ours, ids)
        == "<|im_start|>user\n问<|im_end|>\n<|im_start|>assistant\n答<|im_end|>\n"
    )
    none = Tokenizer.load(foreign_dir("base"))
    with pytest.raises(TokenizerError, match="has no chat template and no tokens"):
        encode_chat(none, turns("问"))


def test_errors_of_a_template_are_reported(foreign_dir: Directory) -> None:
    tokenizer = Tokenizer.load(foreign_dir("llama2"))
    assert unsupported_reason(tokenizer, turns("a", "b")) is None
    assert "roles must alternate" in (unsupported_reason(tokenizer, [SYSTEM, *turns("a")]) or "")
    with pytest.raises(TokenizerError, match=r"rejects the roles user, user: .*must alternate"):
        encode_chat(tokenizer, [*turns("a"), *turns("b")])


def with_template(source: Path, directory: Path, template: str) -> Tokenizer:
    shutil.copytree(source, directory)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Tokenizer.load(directory)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("m.content[:3]", "leaves out message 1"),
        ("m.content[:3] ~ m.content", "shortens or changes"),
        ("m.content[:4000]", "shortens or changes"),
        ("m.content | upper", "shortens or changes"),
        ("m.content | replace('e', '')", "shortens or changes"),
        ("m.content | replace('\n', ' ')", "shortens or changes"),
        ("m.content | tojson", "shortens or changes"),
        ("m.content | e", "shortens or changes"),
        ("m.content.strip(' ')", "shortens or changes"),
        ("m.content[0].text", "leaves out message 1"),
        ("m.role", "leaves out message 1"),
        ("m.content if m.role != 'system'", "leaves out message 1 .*role system"),
        ("m.content if loop.last", "leaves out message 1"),
        ("'\ue0000\ue001' ~ m.content", "shortens or changes"),
        ("'\ue00099\ue001' ~ m.content", "shortens or changes"),
    ],
)
def test_templates_that_change_messages_are_refused(
    expression: str, reason: str, foreign_dir: Directory, tmp_path: Path
) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        f"{{{{ {expression} }}}}<|im_end|>\n{{% endfor %}}"
    )
    tokenizer = with_template(foreign_dir("qwen3"), tmp_path / "a", template)
    messages = [SYSTEM, *turns("a")]
    with pytest.raises(TokenizerError, match=reason):
        encode_chat(tokenizer, messages)
    assert unsupported_reason(tokenizer, messages)


def test_answers_that_do_not_follow_the_generation_prompt_are_not_supervised(
    foreign_dir: Directory, tmp_path: Path
) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    tokenizer = with_template(foreign_dir("qwen3"), tmp_path / "a", template)
    assert "none of its answers" in (unsupported_reason(tokenizer, turns("a", "b")) or "")
    assert unsupported_reason(tokenizer, turns("a")) is None
    _, mask = encode_chat(tokenizer, turns("a", "b"))
    assert not any(mask)
    assert decoded(tokenizer, [tokenizer.im_end]) == "<|im_end|>"
    thinking = Tokenizer.load(foreign_dir("qwen3"))
    assert unsupported_reason(thinking, turns("a", "b", "c", "d")) is None


def test_the_work_for_a_prompt_does_not_grow_with_its_turns(
    foreign_dir: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which answers are supervised takes a rendering per answer, and only training needs it."""
    tokenizer = Tokenizer.load(foreign_dir("qwen3"))
    template = tokenizer.template
    assert template
    renderings: list[int] = []

    def render(roles: tuple[str, ...], *arguments: Any) -> str:
        renderings.append(len(roles))
        return type(template)._render(template, roles, *arguments)

    monkeypatch.setattr(template, "_render", render)
    for number in (1, 3, 31):
        renderings.clear()
        ids, mask = encode_chat(tokenizer, turns(*"a" * number), add_generation_prompt=True)
        assert renderings == [number] * 5
        assert mask == [0] * len(ids)


def test_the_cached_layouts_are_bounded(
    foreign_dir: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_module, "_MAX_CACHED_MESSAGES", 30)
    template = Tokenizer.load(foreign_dir("smollm2")).template
    assert template
    expected = template.layout(("user",), True)
    for number in range(1, 12):
        template.layout(("user", "assistant") * number, True)
        assert sum(len(roles) for roles, _ in template._layouts) <= 30
        assert template.layout(("user",), True) == expected


def test_an_edited_template_is_used(tokenizer_dir: Path, tmp_path: Path) -> None:
    edited = with_template(
        tokenizer_dir,
        tmp_path / "a",
        CHAT_TEMPLATE.replace("'<|im_start|>' +", "'<|im_start|>:' +"),
    )
    ids, _ = encode_chat(edited, turns("a"))
    assert decoded(edited, ids) == "<|im_start|>:user\na<|im_end|>\n"
    assert edited.sha256 != Tokenizer.load(tokenizer_dir).sha256
    (tmp_path / "a" / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    assert Tokenizer.load(tmp_path / "a").sha256 == Tokenizer.load(tokenizer_dir).sha256


class RecordingBPE:
    """Wrapper of a library tokenizer that records the attributes set on it."""

    def __init__(self, bpe: Any) -> None:
        object.__setattr__(self, "bpe", bpe)
        object.__setattr__(self, "changes", [])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bpe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.changes.append(name)
        setattr(self.bpe, name, value)


@pytest.mark.parametrize("name", SHAPES)
def test_no_property_changes_the_tokenizer_after_loading(name: str, foreign_dir: Directory) -> None:
    tokenizer = Tokenizer.load(foreign_dir(name))
    recording = RecordingBPE(tokenizer._bpe)
    tokenizer._bpe = recording  # type: ignore[assignment]
    for attribute in dir(type(tokenizer)):
        if isinstance(getattr(type(tokenizer), attribute), cached_property):
            with suppress(TokenizerError, AssertionError):  # not defined for every tokenizer
                getattr(tokenizer, attribute)
    tokenizer.encode_segments([("x", "start"), ("y", "after_control"), ("z", "inline")])
    assert recording.changes == []
    assert recording.bpe.encode_special_tokens


@pytest.mark.parametrize("name", ["tinyllama", "llama2", "llama3"])
def test_encoding_is_safe_while_other_threads_compute_properties(
    name: str, foreign_dir: Directory
) -> None:
    tokenizer = Tokenizer.load(foreign_dir(name))
    names = [tokenizer._bpe.id_to_token(i) for i in sorted(tokenizer.special_ids)]
    properties = [n for n, v in vars(Tokenizer).items() if isinstance(v, cached_property)]

    def first_use(_: int) -> None:
        for attribute in properties:
            tokenizer.__dict__.pop(attribute, None)
        tokenizer.encode_segments([("x", "start"), ("y", "after_control"), ("z", "inline")])

    def control_tokens(_: int) -> int:
        ids = {i for _ in range(50) for text in names for i in tokenizer.encode(f"{text}x")}
        return len(ids & tokenizer.special_ids)

    with ThreadPoolExecutor(4) as threads:
        uses = [threads.submit(first_use, n) for n in range(100)]
        num_control = sum(threads.map(control_tokens, range(40)))
        for use in uses:
            use.result()
    assert num_control == 0
