from pathlib import Path

import pytest
from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, pre_tokenizers

from minimind.tokenizer import Tokenizer
from minimind.tokenizer.bpe import load_bpe
from minimind.tokenizer.stats import SAMPLE_TEXTS, describe_vocabulary, measure, script_of


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("长江", "Chinese"),
        ("，最后流入", "Chinese"),
        ("用 Python 写程序", "Chinese"),
        (" river", "Latin"),
        ("naïve", "Latin"),
        ("the word 好 in English", "Latin"),
        ("река", "other letters"),
        ("ひらがな", "other letters"),
        ("3.14", "digits and signs"),
        ("。\n", "digits and signs"),
        ("", "digits and signs"),
        ("1949-10-01 x", "digits and signs"),
    ],
)
def test_script(text: str, script: str) -> None:
    assert script_of(text) == script


def test_each_token_is_counted_once(tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    vocabulary = describe_vocabulary(load_bpe(tokenizer_dir))
    assert vocabulary.num_tokens == tokenizer.vocab_size
    assert vocabulary.num_control == 16
    assert sum(vocabulary.by_script.values()) + 16 == tokenizer.vocab_size
    assert vocabulary.by_script["part of a character"] >= 128  # bytes that are not characters
    assert "大熊猫" in vocabulary.longest["Chinese"]
    assert " capital" in vocabulary.longest["Latin"]


def test_characters_per_token_by_script(tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    chinese, english = "长江，黄河。", "The river and the sea."
    usage = measure(load_bpe(tokenizer_dir), [chinese, chinese, english])
    num_chinese, num_english = len(tokenizer.encode(chinese)), len(tokenizer.encode(english))
    assert usage.characters_per_token == {
        "Chinese": len(chinese) / num_chinese,
        "Latin": len(english) / num_english,
        "all": (2 * len(chinese) + len(english)) / (2 * num_chinese + num_english),
    }
    num_bytes = 2 * len(chinese.encode()) + len(english)
    assert usage.bytes_per_token == num_bytes / (2 * num_chinese + num_english)
    used = {*tokenizer.encode(chinese), *tokenizer.encode(english)}
    assert usage.num_unused == tokenizer.vocab_size - 16 - len(used)


def test_no_text_gives_zero(tokenizer_dir: Path) -> None:
    assert measure(load_bpe(tokenizer_dir), []).characters_per_token == {"all": 0.0}


def test_the_built_in_texts_cover_three_scripts(tokenizer_dir: Path) -> None:
    usage = measure(load_bpe(tokenizer_dir), SAMPLE_TEXTS)
    assert list(usage.characters_per_token) == ["Chinese", "Latin", "digits and signs", "all"]


def test_truncation_and_padding_of_the_file_are_ignored(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    expected = measure(load_bpe(tokenizer_dir), SAMPLE_TEXTS)
    bpe = BPE.from_file(str(tokenizer_dir / "tokenizer.json"))
    bpe.enable_truncation(9)
    bpe.enable_padding(length=512)
    bpe.save(str(tmp_path / "tokenizer.json"))
    assert measure(load_bpe(tmp_path), SAMPLE_TEXTS) == expected


def test_a_unigram_tokenizer(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), ("▁river", -1.0), ("▁", -2.0), ("长", -3.0), ("江", -3.0)]
    other = BPE(models.Unigram(pieces, unk_id=0))
    other.pre_tokenizer = pre_tokenizers.Metaspace()
    other.decoder = decoders.Metaspace()
    other.add_special_tokens(["<unk>"])
    other.save(str(tmp_path / "tokenizer.json"))
    bpe = load_bpe(tmp_path)
    vocabulary = describe_vocabulary(bpe)
    assert vocabulary.by_script["Chinese"] == 2
    assert vocabulary.by_script["Latin"] == 1
    assert measure(bpe, ["river river"]).characters_per_token["Latin"] == 11 / 2
