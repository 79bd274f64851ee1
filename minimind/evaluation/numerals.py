"""Values of Chinese numerals and English number words."""

import re
from fractions import Fraction

_DIGITS = {"零": 0, "〇": 0, "两": 2} | {char: n for n, char in enumerate("一二三四五六七八九", 1)}
_UNITS = {"亿": 100_000_000, "万": 10_000, "千": 1_000, "百": 100, "十": 10}

# fmt: off
_SMALL = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
# fmt: on
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_WORDS = {word: n for n, word in enumerate(_SMALL)}
_WORDS |= {word: 10 * n for n, word in enumerate(_TENS, 2)}

_ANY_WORD = "|".join([*_WORDS, "hundred", *_SCALES])
ENGLISH = rf"\b(?:{_ANY_WORD})(?:(?:[ -]|\s+and\s+)(?:{_ANY_WORD}))*\b"


def chinese_value(text: str) -> Fraction:
    """Return the value of a numeral such as 一百零五, 三亿五千万, 二〇二四, 三点一四, 3万5千.

    A single digit after a unit counts in the next lower unit, as in speech: 一百六 is 160.
    """
    for unit, value in _UNITS.items():
        left, separator, right = text.rpartition(unit)
        if separator:
            lower = value // 10 if len(right) == 1 else 1
            return (chinese_value(left) if left else 1) * value + chinese_value(right) * lower
    digits = "".join(str(_DIGITS.get(char, char)) for char in text.replace("点", "."))
    return Fraction(digits or "0")


def english_value(text: str) -> Fraction:
    """Return the value of number words such as one hundred and five."""
    total = section = 0
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in _SCALES:
            total, section = total + max(section, 1) * _SCALES[word], 0
        elif word == "hundred":
            section = max(section, 1) * 100
        elif word in _WORDS:
            section += _WORDS[word]
    return Fraction(total + section)
