import random

import pytest

from minimind.inference.detokenizer import StreamingDetokenizer
from minimind.tokenizer import Tokenizer


def _ids_of_bytes(tokenizer: Tokenizer) -> dict[bytes, int]:
    return {word: i for i, word in enumerate(tokenizer.text_bytes_of) if len(word) == 1}


def test_half_a_character_waits_for_the_other_half(tokenizer: Tokenizer) -> None:
    ids = _ids_of_bytes(tokenizer)
    stream = StreamingDetokenizer(tokenizer)
    shown = [stream.push(ids[bytes([byte])]) for byte in "a熊🐼".encode()]
    assert shown == ["a", "", "", "熊", "", "", "", "🐼"]
    assert stream.finish() == ""


def test_what_never_becomes_a_character_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    ids = _ids_of_bytes(tokenizer)
    stream = StreamingDetokenizer(tokenizer)
    assert stream.push(ids["熊".encode()[:1]]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.push(ids[b"a"]) == "a"  # a new text begins clean


@pytest.mark.parametrize("skip_special_tokens", [False, True])
def test_any_ids_stream_to_what_they_decode_to(
    tokenizer: Tokenizer, skip_special_tokens: bool
) -> None:
    rng = random.Random(0)
    single_bytes = list(_ids_of_bytes(tokenizer).values())
    unknown = [-1, tokenizer.vocab_size, 10**9]
    for _ in range(20_000):
        choices = rng.choice([range(tokenizer.vocab_size), single_bytes, [*range(300), *unknown]])
        ids = rng.choices(choices, k=rng.randrange(16))
        stream = StreamingDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        shown = [stream.push(i) for i in ids]
        whole = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        assert "".join(shown) + stream.finish() == whole
        for at in range(len(ids)):  # what is shown is never taken back
            assert whole.startswith("".join(shown[: at + 1]))


def test_control_tokens_can_be_left_out(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.im_start, *tokenizer.encode("好"), tokenizer.im_end]
    shown = StreamingDetokenizer(tokenizer)
    hidden = StreamingDetokenizer(tokenizer, skip_special_tokens=True)
    assert "".join(map(shown.push, ids)) == "<|im_start|>好<|im_end|>"
    assert "".join(map(hidden.push, ids)) == "好"
