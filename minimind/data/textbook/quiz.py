"""The quiz: held-out questions about the facts, and rule-based grading of answers."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from minimind.data.textbook.tables import Fact, Subject, load_subjects
from minimind.errors import DataError

DEMO_QUESTIONS: tuple[str, ...] = (
    "你知道长江吗？",
    "第一颗人造卫星是哪个国家发射的？",
    "你知道泰山在哪里吗？",
    "世界上最高的山峰是什么？",
    "万有引力是谁提出的？",
    "你知道大熊猫的主要食物是什么吗？",
    "海水为什么是咸的？",
    "你叫什么名字？",
)
_MAX_ANSWER = 240  # characters, about twice the longest answer of the tables
_ENDS = tuple("。！？.!?")
_CLOSING = "”’」』）)\"'"
_NUMERALS = "零〇一二三四五六七八九十百千万亿"
_LATIN = "A-Za-z0-9À-ÿ"
# At the end of a text, it negates the next word: a negated distractor does not count.
_NEGATION_BEFORE = re.compile(
    r"(?:(?:不|没|没有|并非|[是能]否)(?:一定|会|喜欢)?(?:是|叫|属于)?(?:在|位于|吃|用)?"
    r"|(?:\bnot|n't) (?:[a-z]+ ){0,2})$",
    re.IGNORECASE,
)
# A negation anywhere in a clause negates the key after it.
_NEGATION = re.compile(
    r"(?<!差)不(?!但|仅|同|断|少|久|锈|错|管|论|倒翁)|没(?!错|收)|并非|[是能]否|从未|未(?!来|央)|无法"
    r"|[绝决]非|拒绝|否认|难说|别(?=以为|说|认为)"
    r"|\b(?:not|no|never|cannot)\b|n't\b",
    re.IGNORECASE,
)
# A negation directly after the key. 没 alone does not count: “盐没有飞走” is a reason.
_NEGATION_AFTER = re.compile(
    r"(?:并|从来|根本)(?:不|没|非|未)|不是|从未|从没|绝非|\s+(?:is|was|are|were|did|does)(?:n't|\s+not)\b",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"[“《「『][^”》」』]*[”》」』]")
_CLAUSES = re.compile(r"[，。；：！？,;:!?\n]|\.(?!\d)|而(?=[是在叫])|\bbut\b")
_EXPRESSION = re.compile(r"\d+(?:\.\d+)?(?:\s*[乘加减×*+＋－-]\s*\d+(?:\.\d+)?)+")
_IGNORED = re.compile(r"[^\w+×*]+|_+")  # where questions are compared
_FULL_WIDTH = {code: code - 0xFEE0 for code in (*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF5B))}


@dataclass(frozen=True)
class QuizQuestion:
    """A question and the rule for right answers.

    A right answer contains at least one key of each tuple in `keys`, and none of the `distractors`:
    an answer with several values is a guess. `answer` is a reference answer.
    """

    question: str
    keys: tuple[tuple[str, ...], ...]
    subject: str
    answer: str
    distractors: tuple[str, ...] = ()


def normalise(text: str) -> str:
    """Remove punctuation and white space and convert to lower case, to compare questions.

    Arithmetic operators are kept: 9+4 is not 9×4.
    """
    return _IGNORED.sub("", text.lower())


def quiz(subjects: Sequence[Subject] | None = None) -> list[QuizQuestion]:
    """Return all held-out questions, in the order of the tables."""
    return list(_packaged_quiz() if subjects is None else _quiz(subjects))


def sample_quiz(n: int, seed: int, subjects: Sequence[Subject] | None = None) -> list[QuizQuestion]:
    """Return `n` random questions (all, if there are fewer), evenly over the subjects."""
    rng = random.Random(f"quiz {seed}")
    by_subject: dict[str, list[QuizQuestion]] = {}
    for question in quiz(subjects):
        by_subject.setdefault(question.subject, []).append(question)
    for questions in by_subject.values():
        rng.shuffle(questions)
    chosen: list[QuizQuestion] = []
    while len(chosen) < n and any(by_subject.values()):
        remaining = [questions for questions in by_subject.values() if questions]
        rng.shuffle(remaining)
        chosen += [questions.pop() for questions in remaining[: n - len(chosen)]]
    return chosen


def demo_questions() -> list[QuizQuestion]:
    """Return the questions that every report shows. Raises DataError if one is missing."""
    by_text = {question.question: question for question in quiz()}
    missing = [text for text in DEMO_QUESTIONS if text not in by_text]
    if missing:
        raise DataError(f"the tables lack the held-out questions {' '.join(missing)}")
    return [by_text[text] for text in DEMO_QUESTIONS]


def is_correct(question: QuizQuestion, answer: str) -> bool:
    """Return True if an answer is complete, without repetition, with every key and no distractor.

    Numbers and Latin words match only as complete words. A key that is negated in its clause counts
    only if the reference answer negates it too. The repeated question is no answer; neither is an
    operand: 3乘1 contains the key of 3乘1等于多少.
    """
    answer = _canonical(answer)
    asserted = answer
    if _EXPRESSION.search(_canonical(question.question)):
        asserted = _EXPRESSION.sub("", answer)
    return (
        answer.rstrip(_CLOSING).endswith(_ENDS)
        and _max_repetitions(answer) < 3
        and normalise(answer) != normalise(question.question)
        and all(
            any(_asserts(asserted, key, question.answer) for key in keys) for keys in question.keys
        )
        and not any(_contains_affirmed(answer, distractor) for distractor in question.distractors)
    )


def is_well_formed(answer: str) -> bool:
    """Return True for a complete answer of plausible length without repetition or U+FFFD."""
    answer = answer.strip()
    return (
        0 < len(answer) <= _MAX_ANSWER
        and answer.rstrip(_CLOSING).endswith(_ENDS)
        and bool(normalise(answer))
        and "\ufffd" not in answer
        and _max_repetitions(answer) < 2
    )


def fact_question(fact: Fact, question: str) -> QuizQuestion:
    """Return a quiz question for a fact. Distractors in its own row or answers are left out."""
    own = [value for values in fact.row.cells.values() for value in values]
    context = _canonical("。".join((*own, question, *fact.answers)))
    distractors = (
        distractor for key in range(len(fact.keys)) for distractor in fact.distractors(key)
    )
    return QuizQuestion(
        question,
        fact.keys,
        fact.subject.title,
        fact.answers[0],
        tuple(
            distractor for distractor in distractors if not _contains_affirmed(context, distractor)
        ),
    )


def _quiz(subjects: Sequence[Subject]) -> list[QuizQuestion]:
    questions: dict[str, QuizQuestion] = {}
    for subject in subjects:
        for fact in subject.facts:
            for text in fact.held_out:
                if text not in questions:
                    questions[text] = fact_question(fact, text)
    return list(questions.values())


@cache
def _packaged_quiz() -> tuple[QuizQuestion, ...]:
    return tuple(_quiz(load_subjects()))


@lru_cache(1 << 14)
def _canonical(text: str) -> str:
    """Convert full-width letters and digits to ASCII, and 6,300 to 6300."""
    return re.sub(r"(?<=\d),(?=\d{3})", "", text.translate(_FULL_WIDTH)).strip()


@cache
def _value_pattern(value: str, isolated: bool) -> re.Pattern[str]:
    """Return a pattern for a value that is not part of a longer number or Latin word.

    If `isolated`, a single Chinese character must not be part of a longer word either.
    """
    if isolated and len(value) == 1 and "一" <= value <= "龥":
        return re.compile(rf"(?:(?<![一-龥])|(?<=[是为或和与叫])){value}(?:$|[^一-龥]|[或和与])")
    left = right = ""
    if re.match(r"\d", value):
        left = rf"(?<![\d{_NUMERALS}负-])(?<!\d\.)(?<!零下)"
    elif value[0] in _NUMERALS:
        left = rf"(?<![\d{_NUMERALS}])"
    elif re.match(f"[{_LATIN}]", value):
        left = rf"(?<![{_LATIN}])"
    if re.search(r"\d$", value):
        right = rf"(?![{_LATIN}{_NUMERALS}])(?!\.\d)"
    elif value[-1] in _NUMERALS:
        right = rf"(?![\d{_NUMERALS}])"
    elif re.search(f"[{_LATIN}]$", value):
        right = rf"(?![{_LATIN}])"
    return re.compile(left + re.escape(value) + right, re.IGNORECASE)


def _asserts(answer: str, key: str, expected: str) -> bool:
    """Return True if the answer contains the key outside of questions.

    A negated key counts only if the expected answer negates it too.
    """
    statements, key = re.sub(r"[^。！？!?]*[？?]", "", answer), _canonical(key)
    negated = _negations(statements, key)
    return False in negated or (True in negated and True in _negations(_canonical(expected), key))


def _negations(text: str, value: str) -> set[bool]:
    """Return the polarities of the occurrences of a value: True for negated ones.

    An occurrence is negated by its clause before it or directly after it. Occurrences directly
    after a negation are ignored.
    """
    if value.lower() not in text.lower():  # the usual case; far faster than the pattern
        return set()
    clauses = [
        (_CLAUSES.split(_QUOTED.sub("", text[: match.start()]))[-1], match.end())
        for match in _value_pattern(value, False).finditer(text)
    ]
    return {
        bool(_NEGATION.search(before) or _NEGATION_AFTER.match(text, end))
        for before, end in clauses
        if not _NEGATION_BEFORE.search(before)
    }


def _contains_affirmed(answer: str, distractor: str) -> bool:
    """Return True if the answer contains the distractor without a negation directly before it."""
    value = _canonical(distractor)
    if value.lower() not in answer.lower():  # the usual case; far faster than the pattern
        return False
    matches = _value_pattern(value, True).finditer(answer)
    return any(not _NEGATION_BEFORE.search(answer[: match.start()]) for match in matches)


def _max_repetitions(answer: str) -> int:
    """Return the count of the most frequent phrase; 3 for a part repeated without separators."""
    if re.search(r"([^\d\s…]\D+?)\1\1|([^\d\s…])\2{3}|(\d)\3{9}", answer):
        return 3
    phrases = Counter(normalise(part) for part in re.split(r"[，。！？；、,.!?;\n]", answer))
    return max((count for phrase, count in phrases.items() if len(phrase) > 1), default=0)
