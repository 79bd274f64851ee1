"""The vocabulary and the chat template of a model directory, as GGUF describes them.

llama.cpp does not read a split pattern from the file: it knows some by name (`tokenizer.ggml.pre`)
and refuses or misreads others. So a tokenizer can be exported when its pattern is one of those.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind.errors import ModelError
from minimind.tokenizer import Tokenizer
from minimind.tokenizer.bpe import SPLIT_PATTERN

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama_token_type in llama.cpp

# Llama 3's differs from ours, Qwen 2's, in that up to three digits stay together.
_LLAMA3 = SPLIT_PATTERN.replace(r"\p{L}+|\p{N}|", r"\p{L}+|\p{N}{1,3}|")
_NAMES = {SPLIT_PATTERN: "qwen2", _LLAMA3: "llama-bpe"}


@dataclass(frozen=True)
class GGUFVocabulary:
    """Tokens by id with their types, merges by rank, and the ids that llama.cpp needs by role."""

    pre: str  # name of the split pattern
    tokens: list[str]
    types: list[int]
    merges: list[str]
    eos_id: int  # ends an answer
    eot_ids: list[int]  # end an answer too
    pad_id: int
    bos_id: int | None  # stands before every text
    chat_template: str | None


def read_vocabulary(directory: Path, vocab_size: int) -> GGUFVocabulary:
    """Read the tokenizer of a model directory; the embedding has `vocab_size` rows.

    Raises ModelError for a tokenizer that llama.cpp cannot represent.
    """
    tokenizer = Tokenizer.load(directory)
    path = directory / "tokenizer.json"
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    pre = _split_pattern_name(path, content)
    names: dict[int, str] = {index: name for name, index in content["model"]["vocab"].items()}
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    names |= {index: token["content"] for index, token in added.items()}

    def type_of(index: int) -> int:
        if index not in names:
            return UNUSED
        if index in added:
            return CONTROL if added[index]["special"] else USER_DEFINED
        return NORMAL

    merges = content["model"]["merges"]
    eos, *others = tokenizer.stop_ids
    start = tokenizer.text_start
    return GGUFVocabulary(
        pre=pre,
        tokens=[names.get(index, f"[UNUSED{index}]") for index in range(vocab_size)],
        types=[type_of(index) for index in range(vocab_size)],
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        eos_id=eos,
        eot_ids=others,
        pad_id=tokenizer.end_of_text,
        bos_id=start[0] if start else None,
        chat_template=read_chat_template(directory),
    )


def _split_pattern_name(path: Path, content: dict[str, Any]) -> str:
    """Return llama.cpp's name of a byte-level tokenizer's split pattern."""
    model, before = content["model"], content.get("pre_tokenizer") or {}
    steps = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    if model.get("type") != "BPE" or not byte_level:
        raise ModelError(f"{path}: only a byte-level BPE tokenizer can be written as GGUF")
    if byte_level[0].get("add_prefix_space"):
        raise ModelError(f"{path}: add_prefix_space has no counterpart in GGUF")
    others = [step for step in steps if step not in byte_level]
    if not others and byte_level[0].get("use_regex", True):
        return "gpt-2"
    patterns = [step.get("pattern", {}).get("Regex") for step in others]
    if len(patterns) != 1 or patterns[0] not in _NAMES:
        raise ModelError(
            f"{path}: llama.cpp has no name for this split pattern: {patterns}. Known are those "
            f"of {', '.join([*_NAMES.values(), 'gpt-2'])}"
        )
    return _NAMES[patterns[0]]


def read_chat_template(directory: Path) -> str | None:
    """Return the Jinja chat template of a model directory, as transformers would find it."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    config = directory / "tokenizer_config.json"
    raw = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    template = raw.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {one.get("name"): one.get("template") for one in template}.get("default")
    return template if isinstance(template, str) else None
