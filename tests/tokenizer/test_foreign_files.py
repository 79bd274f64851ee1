"""Files of third-party tokenizers: invalid ones, hostile templates, added tokens, sizes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minimind.errors import TokenizerError
from minimind.tokenizer import Tokenizer
from minimind.tokenizer.chat import encode_chat

Directory = Callable[[str], Path]


def test_missing_files_that_define_eos_are_reported(foreign_dir: Directory, tmp_path: Path) -> None:
    directory = shutil.copytree(foreign_dir("llama3"), tmp_path / "a")
    for path in directory.iterdir():
        if path.name != "tokenizer.json":
            path.unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json .*missing here"):
        Tokenizer.load(directory)


def changed(source: Path, directory: Path, file: str, change: Callable[[Any], object]) -> Path:
    shutil.copytree(source, directory)
    content = json.loads((directory / file).read_text("utf-8"))
    change(content)
    (directory / file).write_text(json.dumps(content), encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template is not text"),
        ("tokenizer_config.json", {"chat_template": "{% for %}"}, "template cannot be read"),
        ("tokenizer_config.json", {"chat_template": "{% import os %}"}, "template cannot be read"),
        ("tokenizer_config.json", {"chat_template": "{% break %}"}, "template cannot be read"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id must be"),
        ("generation_config.json", {"eos_token_id": [True]}, "eos_token_id must be"),
    ],
)
def test_invalid_files_are_refused(
    file: str, changes: dict[str, Any], message: str, foreign_dir: Directory, tmp_path: Path
) -> None:
    broken = changed(foreign_dir("llama3"), tmp_path / "a", file, lambda c: c.update(changes))
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(broken)
    (broken / file).write_text("[")
    with pytest.raises(TokenizerError, match=f"{file}: is not JSON"):
        Tokenizer.load(broken)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__subclasses__() }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ messages[0].content * 99 }}{% endfor %}",
        "{{ 'x' * 300000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    ],
)
def test_hostile_templates_are_refused(
    template: str, foreign_dir: Directory, tmp_path: Path
) -> None:
    hostile = changed(
        foreign_dir("llama3"),
        tmp_path / "a",
        "tokenizer_config.json",
        lambda c: c.update(chat_template=template),
    )
    with pytest.raises(TokenizerError, match="chat template rejects"):
        encode_chat(Tokenizer.load(hostile), [{"role": "user", "content": "a"}])


def test_a_tokenizer_in_which_text_can_spell_a_control_token_is_refused(
    foreign_dir: Directory, tmp_path: Path
) -> None:
    def merge(content: Any) -> None:  # adds merges that build "</s>" from its characters
        vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
        for left, right in (("<", "/"), ("</", "s"), ("</s", ">")):
            vocabulary.setdefault(left + right, len(vocabulary) + 10)
            merges.append([left, right])
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"String": "\\n"}
        for token in content["added_tokens"]:
            if token["content"] == "</s>":
                token["id"] = vocabulary["</s>"]

    broken = changed(foreign_dir("base"), tmp_path / "a", "tokenizer.json", merge)
    with pytest.raises(TokenizerError, match="text can be encoded as the control token '</s>'"):
        Tokenizer.load(broken)


def test_an_added_token_that_is_not_special_is_text(foreign_dir: Directory, tmp_path: Path) -> None:
    def add(content: Any) -> None:
        template = content["added_tokens"][0]
        content["added_tokens"].append(template | {"id": 555, "content": "    ", "special": False})

    loaded = Tokenizer.load(changed(foreign_dir("llama3"), tmp_path / "a", "tokenizer.json", add))
    _, added, _ = loaded.encode("a    b")
    assert added not in loaded.special_ids
    assert loaded.decode(loaded.encode("a    b"), skip_special_tokens=True) == "a    b"


def test_a_model_may_have_more_tokens_than_the_tokenizer_but_not_fewer(
    foreign_dir: Directory, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(foreign_dir("qwen3"))
    tokenizer.check_model(tmp_path, tokenizer.vocab_size)
    tokenizer.check_model(tmp_path, tokenizer.vocab_size + 64)
    with pytest.raises(TokenizerError, match="so they do not match"):
        tokenizer.check_model(tmp_path, tokenizer.vocab_size - 1)
