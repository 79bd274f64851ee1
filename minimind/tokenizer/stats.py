"""Statistics of a tokenizer: its vocabulary by script, characters and bytes per token."""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Literal

from tokenizers import Tokenizer as BPE

from minimind.tokenizer.bpe import without_surrogates

Script = Literal["Chinese", "Latin", "other letters", "digits and signs"]
SCRIPTS: tuple[Script, ...] = ("Chinese", "Latin", "other letters", "digits and signs")
PART_OF_CHARACTER = "part of a character"
_NUM_LONGEST = 12
_BATCH_SIZE = 256

# Typical text of each kind, written for this project.
SAMPLE_TEXTS = [
    (
        "清晨的集市已经热闹起来，卖豆腐的老人把木板一块块摆好，向路过的邻居点头问好。"
        "研究人员认为，气候变暖会使冰川融化得更快，从而影响下游城市的供水。\n"
        "学习一门语言没有捷径，每天读一点、写一点，过几个月就能看到进步。"
        "如果电脑突然无法上网，可以先检查路由器的指示灯，再重新启动网络服务。\n"
    ),
    (
        "The ferry left the harbour just before noon, and by evening the islands were only a "
        "thin grey line behind us. Nobody had expected the weather to turn so quickly.\n"
        "To install the package, open a terminal and run the command shown below; if it fails, "
        "check that your version of the interpreter is recent enough.\n"
    ),
    (
        "1949-10-01 08:30:00 | 3.14159 * (42 + 17) = 185.35 | 100% [####----] 50/100\n"
        "$1,299.00 → €1,150.40; +86-10-5555-0199; 192.168.0.1:8080; {} [] () <> && || != >=\n"
    ),
]


@dataclass(frozen=True)
class Vocabulary:
    """Vocabulary of a tokenizer: token counts by kind, and the longest tokens of each script."""

    num_tokens: int
    num_control: int
    by_script: dict[str, int]
    longest: dict[str, list[str]]


@dataclass(frozen=True)
class Usage:
    """Statistics of encoded text: characters and bytes per token, number of unused tokens."""

    characters_per_token: dict[str, float]
    bytes_per_token: float
    num_unused: int


def describe_vocabulary(bpe: BPE) -> Vocabulary:
    """Count the tokens of a vocabulary by script."""
    control = bpe.get_added_tokens_decoder()
    tokens: dict[str, list[str]] = {kind: [] for kind in (*SCRIPTS, PART_OF_CHARACTER)}
    for i in sorted(bpe.get_vocab().values()):
        if i not in control:
            token = bpe.decode([i], skip_special_tokens=False)
            tokens[PART_OF_CHARACTER if "\ufffd" in token else script_of(token)].append(token)
    return Vocabulary(
        num_tokens=bpe.get_vocab_size(),
        num_control=len(control),
        by_script={kind: len(of_kind) for kind, of_kind in tokens.items()},
        longest={
            script: sorted(tokens[script], key=lambda token: (-len(token), token))[:_NUM_LONGEST]
            for script in SCRIPTS
        },
    )


def measure(bpe: BPE, texts: Iterable[str]) -> Usage:
    """Encode texts and measure the result. Each text counts toward its predominant script."""
    characters: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    used: set[int] = set()
    num_bytes = 0
    texts = map(without_surrogates, texts)
    while batch := list(islice(texts, _BATCH_SIZE)):
        encoded = bpe.encode_batch_fast(batch, add_special_tokens=False)
        for text, ids in zip(batch, (e.ids for e in encoded), strict=True):
            script = script_of(text)
            characters[script] += len(text)
            tokens[script] += len(ids)
            num_bytes += len(text.encode())
            used.update(ids)
    per_token = {s: characters[s] / tokens[s] for s in SCRIPTS if tokens[s]}
    total = max(tokens.total(), 1)
    return Usage(
        characters_per_token=per_token | {"all": characters.total() / total},
        bytes_per_token=num_bytes / total,
        num_unused=bpe.get_vocab_size() - len(used | bpe.get_added_tokens_decoder().keys()),
    )


def script_of(text: str) -> Script:
    """Return the predominant script of a text.

    A Chinese character counts as two letters, because it carries more information. Text with more
    than two thirds non-letters is "digits and signs".
    """
    counts = Counter[Script]()
    for character, count in Counter(text).items():
        counts[_script_of_character(character)] += count
    if counts["digits and signs"] * 3 > len(text) * 2 or not text:
        return "digits and signs"
    counts["Chinese"] *= 2
    return max(SCRIPTS[:3], key=lambda script: counts[script])


@cache
def _script_of_character(character: str) -> Script:
    name = unicodedata.name(character, "")
    if name.startswith("CJK") and "IDEOGRAPH" in name:
        return "Chinese"
    if not character.isalpha():
        return "digits and signs"
    return "Latin" if name.startswith("LATIN") else "other letters"
