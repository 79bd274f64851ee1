"""Degeneration: how far answers repeat themselves, never end, or mix up languages, in figures.

They need neither a tokenizer nor a judge, so that any models can be put side by side. A word is a
run of letters or digits, a single Chinese character or kana, or a single sign.

repeated       Share of the answer's 4-grams that were in it before: 1 - distinct / all (rep-4 of
               Welleck et al. 2020), the mean over answers. Good human text is near 0.
never_end      Share of answers that the longest allowed length cut off.
empty          Share of answers without a word.
other_script   Share of answers mostly written in another script than their question. A question
               that asks for a translation counts too, so compare models on the same questions.
mixed_scripts  Share of answers of which a tenth or more of the words are in a script that is
               neither their main one nor found in the question.
distinct_1, 2  Distinct words and bigrams of all answers together, over the number of words (Li et
               al. 2016). More words have fewer new ones among them: compare at like lengths.

In scripts, fenced code and single Latin letters count for nothing: any language has them.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from minimind.evaluation.statistics import ratio_interval, wilson_interval
from minimind.tokenizer.stats import Script, script_of

N = 4
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+|[^\w\s]|_")
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_MIXED = Fraction(1, 10)


@dataclass(frozen=True)
class Answered:
    """A question with its answer; ended: whether the model itself ended it, None = unknown."""

    question: str
    answer: str
    ended: bool | None = True


def words_of(text: str) -> list[str]:
    """Its words in lower case."""
    return _WORD.findall(text.lower())


def repeated_share(words: Sequence[str], n: int = N) -> float:
    """The share of n-grams that are there a second time or more; 0 where there are none."""
    grams = _grams(words, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_share(texts: Sequence[Sequence[str]], n: int) -> float | None:
    """Distinct n-grams over words; None where there is no word."""
    total = sum(map(len, texts))
    return len({gram for words in texts for gram in _grams(words, n)}) / total if total else None


def is_in_other_script(question: str, answer: str) -> bool:
    """Whether most words are of another script than most of the question's."""
    asked, said = _scripts(question), _scripts(answer)
    return bool(asked and said) and _main(asked) != _main(said)


def is_mixed(question: str, answer: str) -> bool:
    """Whether many words are of a script that has no place there."""
    said = _scripts(answer)
    return any(
        count >= _MIXED * said.total()
        for script, count in said.items()
        if script != _main(said) and script not in _scripts(question)
    )


def describe(one: Answered) -> dict[str, Any]:
    """The figures of a single answer."""
    words = words_of(one.answer)
    return {
        "repeated": repeated_share(words),
        "never_ends": None if one.ended is None else not one.ended,
        "empty": not words,
        "other_script": is_in_other_script(one.question, one.answer),
        "mixed_scripts": is_mixed(one.question, one.answer),
    }


def summarise(answers: Sequence[Answered]) -> dict[str, Any]:
    """The figures of all answers, as the head of this page explains them; None: nothing known.

    "intervals" are of 95 %: over answers drawn again for what is repeated, Wilson's for shares.
    """
    each = [describe(one) for one in answers]
    texts = [words_of(one.answer) for one in answers]
    repeated = [one["repeated"] for one in each]
    metrics: dict[str, Any] = {
        "answers": len(answers),
        "repeated": sum(repeated) / len(repeated) if repeated else None,
    }
    intervals = {}
    if repeated:
        intervals["repeated"] = ratio_interval(repeated, [1] * len(repeated))
    for name, key in (
        ("never_end", "never_ends"),
        ("empty", "empty"),
        ("other_script", "other_script"),
        ("mixed_scripts", "mixed_scripts"),
    ):
        known = [one[key] for one in each if one[key] is not None]
        metrics[name] = sum(known) / len(known) if known else None
        if known:
            intervals[name] = wilson_interval(sum(known), len(known))
    metrics |= {f"distinct_{n}": distinct_share(texts, n) for n in (1, 2)}
    return metrics | {"intervals": intervals}


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _scripts(text: str) -> Counter[Script]:
    """How many of the words are of each script; digits, signs and an x or y are of none."""
    words = words_of(_CODE.sub(" ", text))
    found = Counter(_script(word) for word in words if not (len(word) == 1 and word.isascii()))
    del found["digits and signs"]
    return found


def _main(scripts: Counter[Script]) -> Script:
    return max(scripts, key=lambda script: (scripts[script], script))


@lru_cache(1 << 14)
def _script(word: str) -> Script:
    return script_of(word)
