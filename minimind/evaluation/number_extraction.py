"""Extraction of the final number of an answer, for scoring GSM8K and CMATH."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from minimind.evaluation.numerals import ENGLISH, chinese_value, english_value

_MAX_DIGITS = 400  # length of a number, and maximum absolute value of an exponent
_MAX_CHARACTERS = 20_000  # only the end of a longer answer is searched
_SUPERSCRIPTS = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
_CHARACTERS = str.maketrans({c: "-" for c in "‐‒–—−"} | {"⁄": "/", "∕": "/", "∶": ":", "’": "'"})

# Substitutions that remove text outside of numbers and unify notations.
_REWRITES = [
    (re.compile(pattern, re.IGNORECASE), into)
    for pattern, into in [
        (r"\\([$%#])", r"\1"),
        (r"\\!", ""),
        (r"(?<=\d)(?:\{,\}|\\[,;:  ])(?=\d{3}(?!\d))", ","),
        (r"\\(?:left|right)(?![a-z])|\^\s*\{?\s*\\circ\s*\}?", ""),
        (r"\\(?:times|cdot|ast)(?![a-z])", "×"),
        (r"\\(?:text|mathrm|mathbf|mathit|textbf|textit|mbox|operatorname)\s*(?=\{)", " "),
        (r"\\[,;: ()\[\]\\]|\\q?quad(?![a-z])", " "),
        (r"_\{?\w{1,3}\}?(?![\w}])", ""),  # indices
        (r"(?<=\d)\*\*(?=\d+(?![\d*]))", "^"),
        # Exponents of units: cm^2, \text{m}^{-3}, cm**2.
        (r"(?<=[a-z)}\u4e00-\u9fff])(?:\s*\^\s*(?:\{[+-]?\d+\}|[+-]?\d+)|\*\*\d(?![\d*]))", ""),
        (r"\*\*|`", ""),
        # Labels of steps and items of a list.
        (r"\b(?:step|question|problem|case|example|method|part|option)\s*\d+\b\s*[:.)]?", " "),
        (r"(?:步骤|方法|第)\s*[\d一二三四五六七八九十]+\s*(?:个?问题|小?题|步|问|种|:)", " "),
        (r"(?:(?<=\n)|^)[ \t]*\(?\d{1,2}(?:[.)、])[ \t]+(?=\S)", " "),
        (r"\((?:约|大约|≈|about|approx|approximately|or about)[^()]*\)", ""),
        (r"\b(?:usd|rmb|cny|eur|gbp|hkd|jpy|inr|rs\.?|rm)\s?(?=\.?\d)", "$"),
        (r"(ratio[^.\d]{0,40}\d+) to (?=\d)", r"\1:"),
    ]
]
_LATEX_FRACTION = re.compile(
    r"\\[dtc]?frac\s*(?:\{\s*(-?[\d.,]+)\s*\}|(\d))\s*(?:\{\s*([\d.,]+)\s*\}|(\d))"
)

_ARABIC = (
    r"(?:(?<![A-Za-z_\d])(?<!\d\.)"
    r"(?:\d{1,3}(?:[,']\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)"
    r"|(?<!\d\ )\d{1,3}(?:\ \d{3})+(?![\d.,/:])|\d+)"
    r"(?:\.\d+)?|(?<![\w.])\.\d+)"
)
_UNIT = r"(?:[百万亿]|千(?![克米瓦卡帕赫伏焦]))"  # 3千克 is three kilograms
_CHINESE = (
    rf"(?:(?:[零〇一二两三四五六七八九十]|{_UNIT})+"
    rf"(?:点[零〇一二三四五六七八九]+(?![十零〇一二三四五六七八九]){_UNIT}*)?)"
)
_AMOUNT = rf"(?:{_ARABIC}(?:\s?{_UNIT}+(?:\d+(?:\.\d+)?{_UNIT}+)*)?|{_CHINESE})"
_POWER = r"\s?\^\s?(?:\{\s*[+-]?\d+\s*\}|[+-]?\d+)"
_NUMBER = re.compile(
    rf"""
      (?P<percent>百分之)\s*(?P<percentage>{_AMOUNT})
    | (?:(?P<whole1>{_AMOUNT})\s*又\s*)?(?P<below1>{_AMOUNT})\s*分之\s*(?P<above1>{_AMOUNT})
    | (?P<yuan>{_ARABIC})元(?P<jiao>\d)角(?:(?P<fen>\d)分)?
    | (?P<left>{_AMOUNT})(?:(?P<gap>\s?):(?P=gap)|\s?比\s?)(?P<right>{_AMOUNT})
    | (?P<whole2>{_AMOUNT})(?:\s*又\s*|\s+(?:and\s+)?)(?P<above2>\d+)\s*/\s*(?P<below2>\d+)
    | (?P<above3>{_ARABIC})\s*/\s*(?P<below3>(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?)
    | (?P<half>{_AMOUNT})\s*(?:个|小时|年|天|斤|米|千克|公斤|月|倍|块|瓶|杯|升)半(?![径圆])
    | (?P<base>{_ARABIC})(?:\s*[×x*·⋅]\s*10(?P<ten>{_POWER})|(?P<power>{_POWER})
        |[eE](?P<e>[+-]?\d+)(?!\w))
    | (?P<arabic>{_ARABIC})\s(?P<scale>thousand|million|billion|trillion)\b
    | (?<=\$)(?P<thousands>{_ARABIC})[kK]\b
    | (?P<plain>{_AMOUNT})
    | (?P<one_half>一?半(?=个|小时|年|斤|米|千克|公斤|天|升|块|瓶|杯|[\s。，,.!！；;]|$))
    | (?P<english>{ENGLISH})
    """,
    re.VERBOSE | re.IGNORECASE,
)
_PERCENT = re.compile(r"\s*(?:%|per\s?cent\b)", re.IGNORECASE)

# A Chinese numeral of at least two characters that cannot be part of another word.
_UNAMBIGUOUS = re.compile(
    r"[二两三四五六七八九]?十[一二三四五六七八九].*|[一二两三四五六七八九][十百千万亿].*|.+点.+"
    r"|[一二三四五六七八九][零〇一二三四五六七八九]*[零〇][零〇一二三四五六七八九]*"
)
_UNIT_OR_END = re.compile(
    r"\s*(?:(?!位数|分[\u4e00-\u9fff](?<!分钟))[个只本元块角分岁人名位头匹条张把支枝根棵朵颗粒片件套双对次遍"
    r"步年月日天周小秒米厘毫公斤吨升度层排行组班页题道间辆架艘台盒箱袋包瓶杯碗盘倍段节座口家户份克千]"
    r"|[。，！；,.!;?)]|\s|$)"
)
# Text before an ambiguous numeral that marks it as the result.
_RESULT = re.compile(r"(?:等于|得到?|分到?|剩下?|余数?是?|还有|需要|答案[是为:]|=)[了约]?\s*$")
_RESULT_OF_MANY = re.compile(
    rf"{_RESULT.pattern}|(?:[是为有了用差多少]|共有?)约?\s*$"
    r"|(?:\b(?:so|is|are|was|equals|leaves|total of|left with)|:)\s*$",
    re.IGNORECASE,
)

_NEGATIVE = re.compile(r"(?:负|零下|\bnegative\s|(?<!\d)(?<!\d\s)\bminus\s)\s*$", re.IGNORECASE)
_MINUS = re.compile(r"(?:(?:^|[^\w\s)\]%.-]|[\u4e00-\u9fff])[ \t]*|(?<=\s))-$")
_SPACED_MINUS = re.compile(r"(?:[=(≈是为]|equals)[ \t]*-[ \t]+$", re.IGNORECASE)
_BINARY = re.compile(r"[\d)\]%][ \t]*-$")

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHES = re.compile(r"####[ \t]*(?=[-$¥€£\d.])([^\n]{1,40})(?:\n|\Z)")
_MARKER = re.compile(
    r"(?:答案|得数)[\]】]?(?:应该|应|就|最后|最终)?(?:(?:是|为|等于|:|：)\s*)*|答\s*:"
    r"|\banswer\s*(?:(?:is|would be|should be|:)\s*)+",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[。！？!?\n]|\.(?=\s|$)")
_OPERATOR = re.compile(r"\s*(?:[-+*×x÷/^(]|plus|times|minus|加|减|乘|除)")
_DIRECT = re.compile(
    r"(?:[\s:$¥€£*_#(-]|about|approximately|approx\.?|therefore|thus|exactly|a total of|equal to|"
    r"大约|约|一共|共|就是|是|为|负|negative|minus)*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Number:
    """A number in a text. ambiguous: it may be part of another word."""

    start: int
    end: int
    value: Fraction | None  # None: too large to be computed
    percent: bool = False
    ambiguous: bool = False


def last_number(text: str) -> Fraction | None:
    r"""Return the final number of an answer, None if there is none.

    A number that the answer marks (\boxed{}, ####, "the answer is", 答案是) takes precedence over
    the last one. A fraction, a mixed number and a ratio count as one number; a percent sign does
    not change the value.
    """
    number = _final_number(text)
    return number.value if number else None


def is_same_number(expected: str, answer: str) -> bool:
    """Return True if an answer's final number is the expected one; 20 % equals both 20 and 0.2."""
    first, second = _final_number(expected), _final_number(answer)
    if first is None or second is None or first.value is None or second.value is None:
        return False
    if first.value == second.value:
        return True
    fractions = [
        value / (100 if percent else 1)
        for value, percent in ((first.value, first.percent), (second.value, second.percent))
    ]
    return first.percent != second.percent and fractions[0] == fractions[1]


def _final_number(text: str) -> _Number | None:
    plain = _normalize(text.rpartition("</think>")[2][-_MAX_CHARACTERS:])
    if number := _last_in(_without_braces(_boxed_content(plain))):
        return number
    plain = _without_braces(_BOXED.sub(" {", plain))
    for match in list(_HASHES.finditer(plain))[-1:]:
        numbers = list(_find_numbers(match[1]))
        if len(numbers) == 1 and len(match[1][numbers[0].end :].split()) < 3:
            return numbers[0]
    for match in list(_MARKER.finditer(plain))[:-4:-1]:
        sentence = _SENTENCE.split(plain[match.end() :].lstrip(), maxsplit=1)[0]
        if number := _number_after_marker(sentence):
            return number
    return _last_in(plain)


def _number_after_marker(sentence: str) -> _Number | None:
    """Return the number in the rest of a sentence after "the answer is"."""
    equals = list(re.finditer(r"[=≈]|等于", sentence))
    if equals:
        result = sentence[equals[-1].end() :]
        numbers = list(_find_numbers(result))
        direct = bool(numbers) and _DIRECT.fullmatch(result[: numbers[0].start])
        if direct and not _OPERATOR.match(result, numbers[0].end):
            return numbers[0]
        if number := _last_in(result):
            return number
    numbers = list(_find_numbers(sentence))
    if numbers and _DIRECT.fullmatch(sentence[: numbers[0].start]):
        return numbers[0]
    return _last_in(sentence)


def _last_in(text: str) -> _Number | None:
    """Return the last number; prefer an unambiguous one, or one that is marked as the result."""
    numbers = list(_find_numbers(text))
    last = next((number for number in reversed(numbers) if not number.ambiguous), None)
    later = [number for number in numbers if last is None or number.start > last.start]
    for number in reversed(later):
        result = _RESULT if number.value in (1, Fraction(1, 2)) else _RESULT_OF_MANY
        if number.ambiguous and result.search(text[max(number.start - 24, 0) : number.start]):
            return number
    return last or next((number for number in reversed(later) if number.value != 1), None)


def _normalize(text: str) -> str:
    text = re.sub("[⁺⁻⁰¹²³⁴-⁹]+", lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub("_?[₀-₉]+|[①-⒛❶-❿]", " ", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda match: " " + unicodedata.normalize("NFKC", match[0]), text)
    text = re.sub("(?<=\\d)[\u00a0\u2009\u202f](?=\\d{3}(?!\\d))", ",", text)
    text = unicodedata.normalize("NFKC", text).translate(_CHARACTERS)
    for pattern, into in _REWRITES:
        text = pattern.sub(into, text)
    return _LATEX_FRACTION.sub(_plain_fraction, text)


def _plain_fraction(match: re.Match[str]) -> str:
    above, below = match[1] or match[2], match[3] or match[4]
    space = " " if re.search(r"\d\s*$", match.string[: match.start()][-3:]) else ""
    return f"{space}{above}/{below} "


def _boxed_content(text: str) -> str:
    r"""Return the content of the last \boxed{…}, with nested braces."""
    *_, start = 0, *(match.end() for match in _BOXED.finditer(text))
    end, depth = start, 1 if start else 0
    while depth and end < len(text):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return text[start:end]


def _without_braces(text: str) -> str:
    text = re.sub(r"\^\s*\{\s*([+-]?\d+)\s*\}", r"^\1", text)
    return re.sub(r"\\[A-Za-z]+|[{}]", " ", text)


def _find_numbers(text: str) -> Iterator[_Number]:
    for match in _NUMBER.finditer(text):
        ambiguous = _is_ambiguous(match)
        if match["plain"] and ambiguous and not _is_followed_by_unit(match):
            continue
        try:
            value = _value_of(match)
        except ZeroDivisionError:
            continue
        if value is not None and _is_negative(text[max(match.start() - 16, 0) : match.start()]):
            value = -value
        percent = bool(match["percent"] or _PERCENT.match(text, match.end()))
        yield _Number(match.start(), match.end(), value, percent, ambiguous)


def _is_ambiguous(match: re.Match[str]) -> bool:
    plain = match["plain"]
    if plain is None:
        return bool(match["english"] or match["one_half"])
    return not (re.search(r"\d", plain) or _UNAMBIGUOUS.fullmatch(plain))


def _is_followed_by_unit(match: re.Match[str]) -> bool:
    """Return True for a Chinese numeral before a unit, False within words such as 一共."""
    before = match.string[max(match.start() - 1, 0) : match.start()]
    return before not in {"第", "每"} and bool(_UNIT_OR_END.match(match.string, match.end()))


def _is_negative(before: str) -> bool:
    before = re.sub(r"[$¥€£][ \t]*$", "", before)
    if _NEGATIVE.search(before) or _SPACED_MINUS.search(before):
        return True
    return bool(_MINUS.search(before)) and not _BINARY.search(before)


def _value_of(match: re.Match[str]) -> Fraction | None:
    """Return the value of a number, None if it has too many digits. Raises ZeroDivisionError."""
    if len(match[0]) > _MAX_DIGITS:
        return None
    parts = {name: text for name, text in match.groupdict().items() if text}
    number = {name: _parse_amount(text) for name, text in parts.items() if name in _AMOUNTS}
    for digit in "123":
        if f"below{digit}" in number:
            fraction = number[f"above{digit}"] / number[f"below{digit}"]
            return number.get(f"whole{digit}", Fraction(0)) + fraction
    if "left" in number:
        return number["left"] / number["right"]
    if "yuan" in number:
        return number["yuan"] + number["jiao"] / 10 + number.get("fen", Fraction(0)) / 100
    if "half" in number:
        return number["half"] + Fraction(1, 2)
    if "one_half" in parts:
        return Fraction(1, 2)
    if "english" in parts:
        return english_value(parts["english"])
    if "base" in number:
        exponent = int(re.sub(r"[^\d+-]", "", parts.get("ten") or parts.get("power") or parts["e"]))
        if abs(exponent) > _MAX_DIGITS:
            return None
        if "power" in parts:
            return number["base"] ** exponent
        return number["base"] * Fraction(10) ** exponent
    if "arabic" in number:
        return number["arabic"] * english_value(parts["scale"])
    if "thousands" in number:
        return number["thousands"] * 1000
    return number.get("percentage", number.get("plain"))


_AMOUNTS = {
    *("percentage", "whole1", "below1", "above1", "whole2", "below2", "above2", "above3", "below3"),
    *("left", "right", "yuan", "jiao", "fen", "half", "base", "arabic", "thousands", "plain"),
}


def _parse_amount(text: str) -> Fraction:
    digits = re.sub(r"[,'\s]", "", text)
    return Fraction(digits) if re.fullmatch(r"[\d.]+", digits) else chinese_value(digits)
