import json
import random
import re
import unicodedata
from pathlib import Path

import pytest

from minimind.data import ngrams
from minimind.data.prepare import shards
from minimind.errors import DataError
from minimind.evaluation import contamination
from minimind.evaluation.contamination import find_contamination

CHINESE = "甲公司在二零一五年十月投资了一个新的项目，此时应当要求乙公司编制哪一种预算？"
ENGLISH = "Mark has a garden with flowers. He planted plants of three different colors in it."


def write(path: Path, *texts: str) -> str:
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def is_contaminated(tmp_path: Path, question: str, *texts: str) -> bool:
    result = find_contamination({"q": question}, [write(tmp_path / "data.jsonl", *texts)])
    assert not result.too_short
    return "q" in result.found


def test_24_consecutive_characters_are_found(tmp_path: Path) -> None:
    plain = re.sub(r"\W", "", CHINESE)
    assert len(plain) > 30
    assert is_contaminated(tmp_path, CHINESE, "前面" + plain[3:27] + "后面")
    assert not is_contaminated(tmp_path, CHINESE, "前面" + plain[3:26] + "后面")
    assert not is_contaminated(tmp_path, CHINESE, plain[:15], plain[15:])  # in two documents


def test_case_punctuation_and_width_are_ignored(tmp_path: Path) -> None:
    assert is_contaminated(tmp_path, CHINESE, "“" + "，".join(CHINESE) + "”")
    wide = "已知函数ＡＢ１２３的图像经过原点并且在区间上单调递增"
    assert is_contaminated(tmp_path, wide, unicodedata.normalize("NFKC", wide).lower())


def test_13_consecutive_english_words_are_found(tmp_path: Path) -> None:
    words = re.findall(r"\w+", ENGLISH)
    assert is_contaminated(tmp_path, ENGLISH, "so " + "  ".join(words[1:14]).upper() + "!")
    assert not is_contaminated(tmp_path, ENGLISH, " ".join(words[1:13]) + " others")
    assert not is_contaminated(tmp_path, ENGLISH, " ".join(words[:8]), " ".join(words[8:]))


def test_short_questions_must_occur_in_full(tmp_path: Path) -> None:
    short = "王利发是老舍戏剧作品____中的主人公。"
    assert is_contaminated(tmp_path, short, "问：王利发是老舍戏剧作品中的主人公吗？")
    assert not is_contaminated(tmp_path, short, "王利发是老舍戏剧作品中的主人")
    seven = "Who wrote the play about the teahouse?"
    assert is_contaminated(tmp_path, seven, "Tell me who wrote the play about the teahouse.")
    assert not is_contaminated(tmp_path, seven, "who wrote the play about the")


def test_questions_too_short_to_search_are_counted(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", "正确的是 which is right")
    result = find_contamination({"a": "正确的是", "b": "which is right"}, [data])
    assert result.too_short == {"a", "b"}
    assert result.found == {}
    assert result.metrics()["too_short"] == 2
    assert find_contamination({"x:a": "正确的是", "y:a": "否"}, [data]).with_prefix(
        "x:"
    ).too_short == {"a"}


def test_all_schemas_are_searched_and_the_file_is_reported(tmp_path: Path) -> None:
    write(tmp_path / "1.jsonl", "别的")
    turns = [{"role": "user", "content": CHINESE}, {"role": "assistant", "content": "零基预算"}]
    path = tmp_path / "2.jsonl"
    path.write_text(json.dumps({"conversations": turns}) + "\n[1]\n", encoding="utf-8")
    reported: list[int] = []
    result = find_contamination({"q": CHINESE}, [str(tmp_path)], reported.append)
    assert result.found == {"q": str(path)}
    assert result.invalid_records == 1
    assert sum(reported) == contamination.files_size([str(tmp_path)])
    with pytest.raises(DataError, match="no such file"):
        find_contamination({"q": CHINESE}, [str(tmp_path / "3.jsonl")])


def test_results_equal_a_search_for_every_ngram(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an alphabet of three characters, so that n-grams repeat and hashes collide."""
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 300)
    monkeypatch.setattr(ngrams, "_CHARACTERS", ngrams._NGrams(6, 3))
    rng = random.Random(0)

    def text(length: int) -> str:
        return "".join(rng.choice("山水火") for _ in range(length))

    questions = {str(n): text(rng.randint(2, 14)) for n in range(150)}
    texts = [text(rng.randint(1, 40)) for _ in range(60)]
    result = find_contamination(questions, [write(tmp_path / "data.jsonl", *texts)])

    def occurs(question: str) -> bool:
        size = min(len(question), 6)
        ngrams = [question[i : i + size] for i in range(len(question) - size + 1)]
        return any(ngram in text for ngram in ngrams for text in texts)

    expected = {name for name, q in questions.items() if len(q) >= 3 and occurs(q)}
    assert set(result.found) == expected
    assert 10 < len(expected) < 140
    assert result.too_short == {name for name, q in questions.items() if len(q) < 3}
