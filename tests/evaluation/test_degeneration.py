import math

import pytest

from minimind.evaluation.degeneration import (
    AnsweredQuestion,
    distinct_fraction,
    has_mixed_scripts,
    is_in_other_script,
    measure,
    repeated_fraction,
    split_words,
    summarize,
)


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("长江ABC 12km。", ["长", "江", "abc", "12km", "。"]),
        ("I'm here_now!", ["i", "'", "m", "here", "_", "now", "!"]),
        ("ひらカナ漢字", list("ひらカナ漢字")),
        ("Привет, мир", ["привет", ",", "мир"]),
        ("𠀀中\n", ["𠀀", "中"]),
        (" \n", []),
    ],
)
def test_words_are_chinese_characters_or_runs_of_letters(text: str, units: list[str]) -> None:
    assert split_words(text) == units


@pytest.mark.parametrize(
    ("units", "n", "fraction"),
    [
        ("", 4, 0),
        ("abc", 4, 0),  # no 4-gram
        ("abcd", 4, 0),
        ("abcdabcd", 4, 1 / 5),  # abcd bcda cdab dabc abcd
        ("aaaaaaa", 4, 3 / 4),  # 4 of which 1 is distinct
        ("abab", 2, 1 / 3),  # ab ba ab
        ("abab", 1, 1 / 2),
    ],
)
def test_repeated_fraction_by_hand(units: str, n: int, fraction: float) -> None:
    assert repeated_fraction(list(units), n) == pytest.approx(fraction)


def test_a_looping_answer_repeats_nearly_everything() -> None:
    assert repeated_fraction(split_words("泰山很高。" * 50)) == pytest.approx(1 - 5 / 247)


def test_distinct_fraction_by_hand() -> None:
    texts = [list("abab"), list("abc")]  # a b c of 7 words; ab ba bc of 7 words
    assert distinct_fraction(texts, 1) == pytest.approx(3 / 7)
    assert distinct_fraction(texts, 2) == pytest.approx(3 / 7)
    assert distinct_fraction([list("abcd")], 2) == pytest.approx(3 / 4)  # over words, not bigrams
    assert distinct_fraction([[], []], 1) is None


@pytest.mark.parametrize(
    ("question", "answer", "other", "mixed"),
    [
        ("长江有多长？", "长江全长约6300公里。", False, False),
        ("长江有多长？", "The Yangtze is very long.", True, False),
        ("How long is it?", "它很长。", True, False),
        ("长江有多长？", "长江 is very long, 约六千三百公里。", False, True),
        ("什么是CPU？", "CPU是电脑的大脑，CPU很快。", False, False),  # it occurs in the question
        ("长江有多长？", "长江是中国最长的一条大河，全长约六千三百公里，DNA。", False, False),
        ("长江有多长？", "长江 Волга 很长", False, True),
        ("长江有多长？", "6300", False, False),
        ("长江有多长？", "", False, False),
        ("x + y = 4z，求 x 和 y。", "不知道。", False, False),
        ("1+1=?", "two", False, False),  # the question has no script
        ("写一个程序。", "```python\nprint('hello world')\n```\n这样就行。", False, False),
        ("写一个程序。", "好的：\n```python\nprint('never closed')", False, False),
    ],
)
def test_other_and_mixed_scripts(question: str, answer: str, other: bool, mixed: bool) -> None:
    assert is_in_other_script(question, answer) is other
    assert has_mixed_scripts(question, answer) is mixed


def test_a_tenth_of_the_words_has_mixed_scripts() -> None:
    assert has_mixed_scripts("问", "字" * 9 + "word")
    assert not has_mixed_scripts("问", "字" * 10 + "word")


def test_metrics_of_one_answer() -> None:
    assert measure(AnsweredQuestion("问", "啊啊啊啊啊", ended=False)) == {
        "repeated": 0.5,
        "never_ends": True,
        "empty": False,
        "other_script": False,
        "mixed_scripts": False,
    }
    assert measure(AnsweredQuestion("问", " ", ended=None))["never_ends"] is None


def test_metrics_of_several_answers_by_hand() -> None:
    answers = [
        AnsweredQuestion("问", "啊啊啊啊啊", ended=False),  # 2 4-grams, 1 distinct
        AnsweredQuestion("问", "好。", ended=True),
        AnsweredQuestion("问", "yes", ended=None),
        AnsweredQuestion("问", "", ended=True),
    ]
    metrics = summarize(answers)
    assert metrics["answers"] == 4
    assert metrics["repeated"] == pytest.approx(0.5 / 4)
    assert metrics["never_end"] == pytest.approx(1 / 3)  # unknown for one of them
    assert metrics["empty"] == metrics["other_script"] == 1 / 4
    assert metrics["mixed_scripts"] == 0
    assert metrics["distinct_1"] == pytest.approx(4 / 8)  # 啊 好 。 yes
    assert metrics["distinct_2"] == pytest.approx(2 / 8)  # 啊啊 好。
    low, high = metrics["intervals"]["repeated"]
    assert (low, high) == (0, pytest.approx(0.375, abs=0.126))
    assert all(0 <= low <= high <= 1 for low, high in metrics["intervals"].values())


def test_unknown_metrics_are_none() -> None:
    metrics = summarize([])
    assert metrics.pop("answers") == 0
    assert metrics.pop("intervals") == {}
    assert set(metrics.values()) == {None}
    assert summarize([AnsweredQuestion("问", "好", ended=None)])["never_end"] is None


def test_the_interval_equals_that_of_the_normal_distribution() -> None:
    answers = [AnsweredQuestion("问", "啊" * (5 if n % 3 else 3)) for n in range(600)]
    metrics = summarize(answers)
    error = 1.96 * math.sqrt((1 / 2) ** 2 * (2 / 3) * (1 / 3) / 600)
    assert metrics["repeated"] == pytest.approx(1 / 3)
    assert metrics["intervals"]["repeated"] == pytest.approx(
        (1 / 3 - error, 1 / 3 + error), abs=error / 5
    )
