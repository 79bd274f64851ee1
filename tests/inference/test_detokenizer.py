import random

import pytest

from minimind.inference.detokenizer import StreamingDetokenizer
from minimind.tokenizer import Tokenizer


def _ids_of_bytes(tokenizer: Tokenizer) -> dict[bytes, int]:
    return {token: i for i, token in enumerate(tokenizer.text_bytes_of) if len(token) == 1}


def test_incomplete_characters_are_not_returned_yet(tokenizer: Tokenizer) -> None:
    ids = _ids_of_bytes(tokenizer)
    stream = StreamingDetokenizer(tokenizer)
    pieces = [stream.push(ids[bytes([byte])]) for byte in "a熊🐼".encode()]
    assert pieces == ["a", "", "", "熊", "", "", "", "🐼"]
    assert stream.finish() == ""


def test_finish_returns_incomplete_characters_as_u_fffd(tokenizer: Tokenizer) -> None:
    ids = _ids_of_bytes(tokenizer)
    stream = StreamingDetokenizer(tokenizer)
    assert stream.push(ids["熊".encode()[:1]]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.push(ids[b"a"]) == "a"  # finish resets


@pytest.mark.parametrize("skip_special_tokens", [False, True])
def test_streamed_text_equals_decoded_text(tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
    rng = random.Random(0)
    single_bytes = list(_ids_of_bytes(tokenizer).values())
    unknown = [-1, tokenizer.vocab_size, 10**9]
    for _ in range(20_000):
        choices = rng.choice([range(tokenizer.vocab_size), single_bytes, [*range(300), *unknown]])
        ids = rng.choices(choices, k=rng.randrange(16))
        stream = StreamingDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        pieces = [stream.push(i) for i in ids]
        decoded = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        assert "".join(pieces) + stream.finish() == decoded
        for at in range(len(ids)):  # returned text is never revised
            assert decoded.startswith("".join(pieces[: at + 1]))


def test_control_tokens_can_be_skipped(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.im_start, *tokenizer.encode("好"), tokenizer.im_end]
    visible = StreamingDetokenizer(tokenizer)
    hidden = StreamingDetokenizer(tokenizer, skip_special_tokens=True)
    assert "".join(map(visible.push, ids)) == "<|im_start|>好<|im_end|>"
    assert "".join(map(hidden.push, ids)) == "好"
