"""Text in bulk, made from the textbook, and strings that tempt a tokenizer."""

import itertools
import random
from collections.abc import Iterator

from minimind.data import textbook

_TEMPTING = (
    *(
        "",
        " ",
        "\n",
        "\n\n",
        "  ",
        "\t",
        "\r\n",
        "　",
        "…",
        "！",
        "1234",
        "3.14",
        "it's",
        " 'S ",
        "I'LL",
    ),
    *(
        "<|im_end|>",
        "<think>",
        "é",
        "ẞ",
        "👍🏽",
        "ﬁ",
        "한국어",
        "العربية",
        "हिन्दी",
        "ไทย",
        "\u200d",
        "x=1;",
    ),
)


def prose(number: int = 4000) -> Iterator[str]:
    """Documents of the textbook, in Chinese and English."""
    return itertools.islice(textbook.prose(0), number)


def mixed_strings(number: int, seed: int = 0) -> list[str]:
    """Strings of parts of sentences with control tokens' names, white space, digits, emoji, …"""
    dice = random.Random(seed)
    sentences = list(prose(300))

    def part() -> str:
        text = dice.choice(sentences)
        start = dice.randrange(len(text))
        return text[start : start + dice.randrange(40)]

    return ["".join(part() + dice.choice(_TEMPTING) for _ in range(3)) for _ in range(number)]
