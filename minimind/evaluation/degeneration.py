"""Degeneration metrics: repetition, answers that never end, and mixed languages.

The metrics need neither a tokenizer nor a judge, so any models can be compared. A word is a run of
letters or digits, a single Chinese character or kana, or a single punctuation mark or symbol.

repeated       The fraction of an answer's 4-grams that occurred before in it: 1 - distinct / all
               (rep-4 of Welleck et al. 2020), averaged over answers. Good human text is near 0.
never_end      The fraction of answers that the token limit cut off.
empty          The fraction of answers without a word.
other_script   The fraction of answers whose main script differs from that of their question.
               Translations on request count too, so compare models on the same questions.
mixed_scripts  The fraction of answers in which at least a tenth of the words is in a script that
               is neither the answer's main script nor occurs in the question.
distinct_1, 2  Distinct words and bigrams of all answers, divided by the number of words (Li et al.
               2016). The ratio falls with the number of words: compare at similar lengths.

Fenced code and single Latin letters are ignored when scripts are counted, because texts in any
language contain them.
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
_SINGLE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_SINGLE}]|[^\W_{_SINGLE}]+|[^\w\s]|_")
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_MIXED_FRACTION = Fraction(1, 10)


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question with its answer. ended: False if the token limit cut it off, None if unknown."""

    question: str
    answer: str
    ended: bool | None = True


def split_words(text: str) -> list[str]:
    """Split a text into words in lower case."""
    return _WORD.findall(text.lower())


# --8<-- [start:repeated]
def repeated_fraction(words: Sequence[str], n: int = N) -> float:
    """Return the fraction of n-grams that occurred before; 0 if there are none."""
    grams = _ngrams(words, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


# --8<-- [end:repeated]


def distinct_fraction(texts: Sequence[Sequence[str]], n: int) -> float | None:
    """Return the number of distinct n-grams per word; None without words."""
    total = sum(map(len, texts))
    return len({gram for words in texts for gram in _ngrams(words, n)}) / total if total else None


def is_in_other_script(question: str, answer: str) -> bool:
    """Return True if the main scripts of question and answer differ."""
    question_scripts, answer_scripts = _count_scripts(question), _count_scripts(answer)
    if not question_scripts or not answer_scripts:
        return False
    return _main_script(question_scripts) != _main_script(answer_scripts)


def has_mixed_scripts(question: str, answer: str) -> bool:
    """Return True if a tenth of the words is in a script of neither answer nor question.

    The answer's own script is that of most of its words.
    """
    scripts = _count_scripts(answer)
    return any(
        count >= _MIXED_FRACTION * scripts.total()
        for script, count in scripts.items()
        if script != _main_script(scripts) and script not in _count_scripts(question)
    )


def measure(answered: AnsweredQuestion) -> dict[str, Any]:
    """Return the metrics of a single answer."""
    words = split_words(answered.answer)
    return {
        "repeated": repeated_fraction(words),
        "never_ends": None if answered.ended is None else not answered.ended,
        "empty": not words,
        "other_script": is_in_other_script(answered.question, answered.answer),
        "mixed_scripts": has_mixed_scripts(answered.question, answered.answer),
    }


def summarize(answers: Sequence[AnsweredQuestion]) -> dict[str, Any]:
    """Return the metrics of all answers; see the module's docstring. None if unknown.

    "intervals" holds 95 % intervals: bootstrap over answers for `repeated`, Wilson for the other
    fractions.
    """
    measured = [measure(answer) for answer in answers]
    texts = [split_words(answer.answer) for answer in answers]
    repeated = [metrics["repeated"] for metrics in measured]
    summary: dict[str, Any] = {
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
        known = [metrics[key] for metrics in measured if metrics[key] is not None]
        summary[name] = sum(known) / len(known) if known else None
        if known:
            intervals[name] = wilson_interval(sum(known), len(known))
    summary |= {f"distinct_{n}": distinct_fraction(texts, n) for n in (1, 2)}
    return summary | {"intervals": intervals}


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _count_scripts(text: str) -> Counter[Script]:
    """Count the words per script, without digits, signs and single Latin letters."""
    words = split_words(_CODE.sub(" ", text))
    scripts = Counter(_script(word) for word in words if not (len(word) == 1 and word.isascii()))
    del scripts["digits and signs"]
    return scripts


def _main_script(scripts: Counter[Script]) -> Script:
    return max(scripts, key=lambda script: (scripts[script], script))


@lru_cache(1 << 14)
def _script(word: str) -> Script:
    return script_of(word)
