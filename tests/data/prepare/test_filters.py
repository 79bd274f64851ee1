import pytest

from minimind.data.prepare import filters
from minimind.data.prepare.characters import code_points
from minimind.data.prepare.filters import drop_reasons
from minimind.data.prepare.settings import load_prepare_settings
from tests.support.corpora import Corpus

SETTINGS = load_prepare_settings()
GOOD = Corpus().document(300)


def reason(text: str) -> str | None:
    [found] = drop_reasons([text], code_points([text]), SETTINGS)
    return found


def test_ordinary_text_is_kept() -> None:
    assert reason(GOOD) is None
    code = "\n".join(f"    result[{n}] = compute(value_{n}, key='{n}')" for n in range(10))
    assert reason(GOOD + "\n" + code) is None


@pytest.mark.parametrize(
    ("text", "kept", "expected"),
    [
        (GOOD[:300].replace("\n", "")[:40], None, filters.TOO_SHORT),
        ("。！？" * 30, None, filters.TOO_SHORT),
        (GOOD + "\ufffd" * 4, GOOD + "\ufffd", filters.UNREADABLE_CHARACTERS),
        ("The river begins on the plateau in the west of the country, and ends in the sea.",
         GOOD + "The river begins on the plateau in the west.", filters.LITTLE_CHINESE),
        (GOOD + "★■" * 35, GOOD + "★■" * 10, filters.MANY_SYMBOLS),
        (GOOD + "…" * 180, GOOD + "…" * 30, filters.MUCH_PUNCTUATION),
        (GOOD + "13800138000 " * 13, GOOD + "13800138000 " * 5, filters.MANY_DIGITS),
        (GOOD + ("\n这一行在文章里面反复地出现了很多很多次") * 9, GOOD + "\n这一行" * 9,
         filters.DUPLICATE_LINES),
        (GOOD + "低价出售各类优质商品欢迎来电，" * 12, GOOD + "低价出售各类优质商品欢迎来电，" * 4,
         filters.DUPLICATE_NGRAMS),
        (GOOD[:70] + "\n上一篇：怎样写好一篇文章 下一篇：怎样读书\n版权所有，不得转载，侵权必究",
         GOOD + "\n版权所有", filters.BOILERPLATE),
    ],
)  # fmt: skip
def test_each_filter(text: str, kept: str | None, expected: str) -> None:
    assert reason(text) == expected
    if kept is not None:
        assert reason(kept) is None


def test_too_long() -> None:
    limits = SETTINGS.model_copy(
        update={"length": SETTINGS.length.model_copy(update={"maximum": 200})}
    )
    assert drop_reasons([GOOD], code_points([GOOD]), limits) == [filters.TOO_LONG]


def test_a_batch_gives_the_reasons_of_its_documents() -> None:
    corpus = Corpus(1)
    texts = [
        corpus.document(400),
        "短",
        "低价出售各类优质商品欢迎来电，" * 12,
        corpus.document(60),
        "1234567890" * 9,
        corpus.document(2000),
    ]
    alone = [reason(text) for text in texts]
    assert drop_reasons(texts, code_points(texts), SETTINGS) == alone
    assert alone[1] == filters.TOO_SHORT
    assert alone[0] is alone[3] is alone[5] is None


def test_shares_are_exact() -> None:
    assert filters.duplicate_line_share("甲甲甲\n乙\n 甲甲甲 \n\n") == 3 / 7
    # Windows of 2: 甲乙 乙甲 甲乙 乙甲 甲乙; three of five repeat an earlier one.
    points = code_points(["甲，乙甲乙甲乙", "甲", "丙丁"])
    assert filters.duplicate_ngram_shares(points, 2).tolist() == [3 / 5, 0, 0]
    assert filters.boilerplate_share("正文\n上一篇：无\n", ["上一篇"]) == 5 / 7


def test_classes_of_characters() -> None:
    counts = code_points(
        ["中〇㐀𠀀", "aéЖあ", "1２Ⅳ", "，.—", " \n\t\u3000", "★=😀", "\ufffd\ue000\x01"]
    )
    assert [row.argmax() for row in counts.counts] == [1, 2, 3, 4, 5, 0, 6]
    assert [row.max() for row in counts.counts] == [4, 4, 3, 3, 4, 3, 3]
    assert "".join(map(chr, code_points(["Ａb，C１　中"]).folded.tolist())) == "abc1中"
