"""The quiz: questions in words that were never trained on, and the marking of answers."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from minimind.data.textbook.tables import Fact, Subject, load_subjects
from minimind.errors import DataError

EIGHT: tuple[str, ...] = (
    "你知道长江吗？",
    "第一颗人造卫星是哪个国家发射的？",
    "你知道泰山在哪里吗？",
    "世界上最高的山峰是什么？",
    "万有引力是谁提出的？",
    "你知道大熊猫的主要食物是什么吗？",
    "海水为什么是咸的？",
    "你叫什么名字？",
)
_MAX_ANSWER = 240  # characters; the longest answer of the tables has about half of that
_ENDS = tuple("。！？.!?")
_CLOSING = "”’」』）)\"'"
_NUMERALS = "零〇一二三四五六七八九十百千万亿"
_LATIN = "A-Za-z0-9À-ÿ"
# What ends so denies the word that comes next: a rival that is denied is not offered.
_DENIAL = re.compile(
    r"(?:(?:不|没|没有|并非|[是能]否)(?:一定|会|喜欢)?(?:是|叫|属于)?(?:在|位于|吃|用)?"
    r"|(?:\bnot|n't) (?:[a-z]+ ){0,2})$",
    re.IGNORECASE,
)
# A negation anywhere in a clause denies the key after it.
_NEGATION = re.compile(
    r"(?<!差)不(?!但|仅|同|断|少|久|锈|错|管|论|倒翁)|没(?!错|收)|并非|[是能]否|从未|未(?!来|央)|无法"
    r"|[绝决]非|拒绝|否认|难说|别(?=以为|说|认为)"
    r"|\b(?:not|no|never|cannot)\b|n't\b",
    re.IGNORECASE,
)
# The same directly after the key. 没 alone is none: “盐没有飞走” is a reason.
_NEGATION_AFTER = re.compile(
    r"(?:并|从来|根本)(?:不|没|非|未)|不是|从未|从没|绝非|\s+(?:is|was|are|were|did|does)(?:n't|\s+not)\b",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"[“《「『][^”》」』]*[”》」』]")
_CLAUSES = re.compile(r"[，。；：！？,;:!?\n]|\.(?!\d)|而(?=[是在叫])|\bbut\b")
_WIDE = {code: code - 0xFEE0 for code in (*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF5B))}


@dataclass(frozen=True)
class QuizQuestion:
    """A question, and what tells a right answer: of each tuple of `keys` any one is in it.

    `answer` is a model answer; an answer with one of the `rivals` is a guess among several.
    """

    question: str
    keys: tuple[tuple[str, ...], ...]
    subject: str
    answer: str
    rivals: tuple[str, ...] = ()


def normalise(text: str) -> str:
    """Text without punctuation, white space and case: what two questions are compared by.

    The signs of sums stay: 9+4 is not 9×4.
    """
    return re.sub(r"[^\w+×*]+|_+", "", text.lower())


def quiz(subjects: Sequence[Subject] | None = None) -> list[QuizQuestion]:
    """Every way of asking that is held out, in the order of the tables."""
    return list(_packaged_quiz() if subjects is None else _quiz(subjects))


def sample_quiz(n: int, seed: int, subjects: Sequence[Subject] | None = None) -> list[QuizQuestion]:
    """`n` questions (all, where there are fewer), from each subject as many as can be."""
    rng = random.Random(f"quiz {seed}")
    by_subject: dict[str, list[QuizQuestion]] = {}
    for question in quiz(subjects):
        by_subject.setdefault(question.subject, []).append(question)
    for questions in by_subject.values():
        rng.shuffle(questions)
    chosen: list[QuizQuestion] = []
    while len(chosen) < n and any(by_subject.values()):
        left = [questions for questions in by_subject.values() if questions]
        rng.shuffle(left)
        chosen += [questions.pop() for questions in left[: n - len(chosen)]]
    return chosen


def eight() -> list[QuizQuestion]:
    """The eight questions that every report shows. Raises DataError if the tables lack one."""
    by_text = {question.question: question for question in quiz()}
    lacking = [text for text in EIGHT if text not in by_text]
    if lacking:
        raise DataError(f"The tables hold out no such question: {' '.join(lacking)}")
    return [by_text[text] for text in EIGHT]


def is_right(question: QuizQuestion, answer: str) -> bool:
    """Whether an answer matches the keywords: whole, not repeating, every key and no rival in it.

    Numbers and Latin words count only as a whole. A key does not count after a negation in its
    clause or directly before one, unless it has one in the expected answer too.
    """
    answer = _plain(answer)
    return (
        answer.rstrip(_CLOSING).endswith(_ENDS)
        and _most_repeated(answer) < 3
        and all(any(_says(answer, key, question.answer) for key in keys) for keys in question.keys)
        and not any(_offers(answer, rival) for rival in question.rivals)
    )


def is_well_formed(answer: str) -> bool:
    """Whether an answer is a whole text of sane length without a repeated or broken part."""
    answer = answer.strip()
    return (
        0 < len(answer) <= _MAX_ANSWER
        and answer.rstrip(_CLOSING).endswith(_ENDS)
        and bool(normalise(answer))
        and "\ufffd" not in answer
        and _most_repeated(answer) < 2
    )


def fact_question(fact: Fact, question: str) -> QuizQuestion:
    """A way of asking for a fact, with what tells a right answer."""
    own = [value for values in fact.row.cells.values() for value in values]
    said = _plain("。".join((*own, question, *fact.answers)))
    rivals = (rival for key in range(len(fact.keys)) for rival in fact.rivals(key))
    return QuizQuestion(
        question,
        fact.keys,
        fact.subject.title,
        fact.answers[0],
        tuple(rival for rival in rivals if not _offers(said, rival)),
    )


def _quiz(subjects: Sequence[Subject]) -> list[QuizQuestion]:
    found: dict[str, QuizQuestion] = {}
    for subject in subjects:
        for fact in subject.facts:
            for text in fact.held_out:
                if text not in found:
                    found[text] = fact_question(fact, text)
    return list(found.values())


@cache
def _packaged_quiz() -> tuple[QuizQuestion, ...]:
    return tuple(_quiz(load_subjects()))


@lru_cache(1 << 14)
def _plain(text: str) -> str:
    """Full-width letters and digits made narrow, 6,300 made 6300."""
    return re.sub(r"(?<=\d),(?=\d{3})", "", text.translate(_WIDE)).strip()


@cache
def _whole(value: str, alone: bool) -> re.Pattern[str]:
    """Finds a value where no number or word goes on before or after it.

    If `alone`, one Chinese character is found only where it stands by itself.
    """
    if alone and len(value) == 1 and "一" <= value <= "龥":
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


def _says(answer: str, key: str, expected: str) -> bool:
    """Whether the answer holds the key as a whole, not asked, and denied only where expected is."""
    told, key = re.sub(r"[^。！？!?]*[？?]", "", answer), _plain(key)
    denials = _denials(told, key)
    return False in denials or (True in denials and True in _denials(_plain(expected), key))


def _denials(text: str, value: str) -> set[bool]:
    """For each place of a value as a whole: whether a negation stands before it in its clause, or
    directly after it.

    Places right after a negation are left out.
    """
    if value.lower() not in text.lower():  # mostly so, and far quicker
        return set()
    clauses = [
        (_CLAUSES.split(_QUOTED.sub("", text[: found.start()]))[-1], found.end())
        for found in _whole(value, False).finditer(text)
    ]
    return {
        bool(_NEGATION.search(before) or _NEGATION_AFTER.match(text, end))
        for before, end in clauses
        if not _DENIAL.search(before)
    }


def _offers(answer: str, rival: str) -> bool:
    """Whether the answer gives the rival; one Chinese character only where it stands by itself."""
    value = _plain(rival)
    if value.lower() not in answer.lower():  # mostly so, and far quicker
        return False
    found = _whole(value, True).finditer(answer)
    return any(not _DENIAL.search(answer[: one.start()]) for one in found)


def _most_repeated(answer: str) -> int:
    """How often its most repeated phrase is there; 3 where a part is said again and again."""
    if re.search(r"([^\d\s…]\D+?)\1\1|([^\d\s…])\2{3}|(\d)\3{9}", answer):
        return 3
    phrases = Counter(normalise(part) for part in re.split(r"[，。！？；、,.!?;\n]", answer))
    return max((count for phrase, count in phrases.items() if len(phrase) > 1), default=0)
