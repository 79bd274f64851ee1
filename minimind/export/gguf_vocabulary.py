"""Vocabulary and chat template of a model directory, in GGUF's terms.

llama.cpp reads no split pattern from the file. It implements some, selected by name
(`tokenizer.ggml.pre`), so only a tokenizer with one of these patterns can be exported.
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
    """Tokens and their types by id, merges by rank, and the ids of tokens with a role."""

    pre: str  # name of the split pattern
    tokens: list[str]
    types: list[int]
    merges: list[str]
    eos_id: int  # ends an answer
    eot_ids: list[int]  # end an answer too
    pad_id: int
    bos_id: int | None  # precedes every text
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
    """Return llama.cpp's name of a byte-level tokenizer's split pattern. Raises ModelError."""
    model, pre = content["model"], content.get("pre_tokenizer") or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    if model.get("type") != "BPE" or not byte_level:
        raise _unsupported(path, "it is not a byte-level BPE")
    if byte_level[0].get("add_prefix_space"):
        raise _unsupported(path, "it sets add_prefix_space")
    # llama.cpp omits the NFC of Qwen's tokenizers, which changes nothing in composed text.
    if (normalizer := (content.get("normalizer") or {}).get("type", "NFC")) != "NFC":
        raise _unsupported(path, f"it has the normalizer {normalizer}")
    others = [step for step in steps if step not in byte_level]
    if not others and byte_level[0].get("use_regex", True):
        return "gpt-2"
    patterns = [step.get("pattern", {}).get("Regex") for step in others]
    if len(patterns) != 1 or patterns[0] not in _NAMES:
        known = ", ".join([*_NAMES.values(), "gpt-2"])
        raise _unsupported(path, f"its split pattern is not that of {known}")
    return _NAMES[patterns[0]]


def _unsupported(path: Path, reason: str) -> ModelError:
    return ModelError(
        f"{path}: this tokenizer cannot be written as GGUF here: {reason}. For a model of another "
        "project try llama.cpp's convert_hf_to_gguf.py"
    )


def read_chat_template(directory: Path) -> str | None:
    """Return the Jinja chat template that transformers would use for a model directory."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    config = directory / "tokenizer_config.json"
    raw = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    template = raw.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    return template if isinstance(template, str) else None
