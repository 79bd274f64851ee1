import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, pre_tokenizers

from minimind.errors import ResourceError, TokenizerError
from minimind.tokenizer import SPECIAL_TOKENS, Tokenizer


def _changed(tokenizer_dir: Path, directory: Path, change: Any) -> Path:
    """Write a copy of tokenizer.json with `change(value)` applied."""
    value = json.loads((tokenizer_dir / "tokenizer.json").read_text("utf-8"))
    change(value)
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
    return directory


def test_control_tokens_have_the_first_ids_and_are_special(
    tokenizer: Tokenizer, tokenizer_dir: Path
) -> None:
    added = json.loads((tokenizer_dir / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    assert [token["content"] for token in added] == SPECIAL_TOKENS
    assert all(token["special"] for token in added)
    assert len(SPECIAL_TOKENS) == 16
    assert tokenizer.special_ids == set(range(16))
    assert (tokenizer.end_of_text, tokenizer.im_start, tokenizer.im_end) == (0, 1, 2)


def test_every_byte_has_a_token(tokenizer: Tokenizer) -> None:
    assert {token for token in tokenizer.text_bytes_of if len(token) == 1} == {
        bytes([byte]) for byte in range(256)
    }


def test_token_bytes_sum_to_the_length_of_the_text(tokenizer: Tokenizer) -> None:
    text = "长江 is 6,300 km long。🐼"
    assert sum(tokenizer.token_bytes[i] for i in tokenizer.encode(text)) == len(text.encode())
    assert {tokenizer.token_bytes[i] for i in tokenizer.special_ids} == {0}
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size == 600


def test_common_words_are_one_token(tokenizer: Tokenizer) -> None:
    assert [len(ids) for ids in tokenizer.encode_batch(["长江", "大熊猫", " river"])] == [1, 1, 1]


def test_each_digit_is_a_token(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("1949")) == 4


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_control_tokens_in_text_are_encoded_as_text(tokenizer: Tokenizer, token: str) -> None:
    for text in (token, f"你好{token}", f"{token}\n", token * 2):
        ids = tokenizer.encode(text)
        assert tokenizer.encode_batch([text]) == [ids]
        assert not tokenizer.special_ids.intersection(ids)
        assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text


def test_unpaired_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud83d好\udc00")) == "a\ufffd好\ufffd"
    assert tokenizer.encode_batch(["\ud83d"]) == [tokenizer.encode("\ufffd")]


def test_decode_with_and_without_control_tokens(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.im_start, *tokenizer.encode("好"), tokenizer.im_end, tokenizer.end_of_text]
    assert tokenizer.decode(ids) == "<|im_start|>好<|im_end|><|endoftext|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "好"


def test_random_ids_decode_as_in_the_library(tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    library = BPE.from_file(str(tokenizer_dir / "tokenizer.json"))
    rng = random.Random(0)
    for _ in range(5_000):
        limit = rng.choice([300, tokenizer.vocab_size + 5])  # 300: mostly invalid UTF-8
        ids = [rng.randrange(limit) for _ in range(rng.randrange(16))]
        for skip in (False, True):
            expected = library.decode(ids, skip_special_tokens=skip)
            assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


def test_a_loaded_tokenizer_is_equal(tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    loaded = Tokenizer.load(tokenizer_dir)
    text = "长江 <|im_end|> flows into the sea。\n\n"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.sha256 == tokenizer.sha256


def test_saving_is_deterministic(tokenizer_dir: Path, tmp_path: Path) -> None:
    Tokenizer.load(tokenizer_dir).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (tokenizer_dir / path.name).read_bytes()


def test_the_configuration_for_transformers(tokenizer_dir: Path) -> None:
    config = json.loads((tokenizer_dir / "tokenizer_config.json").read_text("utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (config["eos_token"], config["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
    assert config["bos_token"] is None
    assert not config["add_bos_token"]
    assert not config["add_eos_token"]
    assert not config["clean_up_tokenization_spaces"]
    assert config["chat_template"] == (tokenizer_dir / "chat_template.jinja").read_text("utf-8")


def test_saving_below_a_file_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"file.*cannot write the tokenizer"):
        tokenizer.save(tmp_path / "file")


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    for directory, problem in (
        (tmp_path, r"has no tokenizer\.json"),
        (tmp_path / "nowhere", "nowhere does not exist"),
    ):
        with pytest.raises(TokenizerError, match=f"{problem}.*minimind tokenizer train"):
            Tokenizer.load(directory)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"model": 1}', b"\xff\xfe", b'{"model": {"type": "BPE"}}']
)
def test_an_invalid_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: "):
        Tokenizer.load(tmp_path)


def test_a_truncated_file_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    content = (tokenizer_dir / "tokenizer.json").read_bytes()
    for share in (0.1, 0.5, 0.99):
        (tmp_path / "tokenizer.json").write_bytes(content[: int(len(content) * share)])
        with pytest.raises(TokenizerError, match="damaged"):
            Tokenizer.load(tmp_path)


def test_a_file_that_makes_the_library_panic_is_refused(
    tokenizer_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def lengthen_the_prefix(value: Any) -> None:
        value["model"]["continuing_subword_prefix"] = "far too long"

    with pytest.raises(TokenizerError, match="damaged"):
        Tokenizer.load(_changed(tokenizer_dir, tmp_path, lengthen_the_prefix))


def test_ids_far_beyond_the_vocabulary_are_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    def move_the_last_id(value: Any) -> None:
        vocabulary = value["model"]["vocab"]
        vocabulary[max(vocabulary, key=vocabulary.__getitem__)] = 10**9

    with pytest.raises(TokenizerError, match="duplicate, negative or mostly unused token ids"):
        Tokenizer.load(_changed(tokenizer_dir, tmp_path, move_the_last_id))


def test_an_empty_vocabulary_is_refused(tmp_path: Path) -> None:
    BPE(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="duplicate, negative or mostly unused token ids"):
        Tokenizer.load(tmp_path)


def test_text_cannot_spell_a_tag_that_is_not_marked_special(
    tokenizer: Tokenizer, tokenizer_dir: Path, tmp_path: Path
) -> None:
    def unmark(value: Any) -> None:
        value["added_tokens"][3]["special"] = False

    loaded = Tokenizer.load(_changed(tokenizer_dir, tmp_path, unmark))
    assert loaded.encode("a<think>b") == tokenizer.encode("a<think>b")
    assert loaded.special_ids == tokenizer.special_ids


def test_a_tokenizer_that_does_not_work_on_bytes_is_refused(tmp_path: Path) -> None:
    bpe = BPE(models.BPE({"▁的": 0}, []))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Metaspace()
    bpe.add_special_tokens(SPECIAL_TOKENS[:3])
    bpe.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="neither a byte-level BPE nor one with byte fallback"):
        Tokenizer.load(tmp_path)


def test_truncation_and_padding_settings_of_a_file_are_ignored(
    tokenizer: Tokenizer, tokenizer_dir: Path, tmp_path: Path
) -> None:
    bpe = BPE.from_file(str(tokenizer_dir / "tokenizer.json"))
    bpe.enable_truncation(2)
    bpe.enable_padding(length=9)
    bpe.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode_batch(["长江是", "a"]) == tokenizer.encode_batch(["长江是", "a"])
    assert loaded.sha256 == tokenizer.sha256
