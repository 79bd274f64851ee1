"""Decoding returns the encoded text, in one call or as a stream."""

import random
from collections.abc import Iterator

import pytest

from minimind.inference.detokenizer import StreamingDetokenizer
from minimind.tokenizer import SPECIAL_TOKENS, Tokenizer

_CHUNK = 10_000
_EDGE_CASES = [
    *SPECIAL_TOKENS,
    "",
    "\r\n",
    "\n\n",
    "   ",
    "\t",
    "\x00",
    "\x7f",
    "\x85",
    "\u2028",
    "\u200b",
    "\ufeff",
    "\ufffd",
    "\uffff",
    "\U0010ffff",
    "e\u0301",
    "\u1100\u1161\u11a8",
    "👩‍👩‍👧‍👦",
    "🇨🇳",
    "\u202e",
    "Ġ",
    "Ċ",
    "'s",
    "123",
    "长江",
    "，",
    "the ",
]


def random_strings(seed: int, num_strings: int) -> Iterator[list[str]]:
    """Yield chunks of strings of 0 to 24 pieces: all planes, Chinese, ASCII, edge cases."""
    rng = random.Random(seed)
    for _ in range(num_strings // _CHUNK):
        anything = [chr(_scalar_value(rng.randrange(0x110000 - 0x800))) for _ in range(6000)]
        plane_0 = [chr(_scalar_value(rng.randrange(0x10000 - 0x800))) for _ in range(6000)]
        chinese = [chr(rng.randrange(0x4E00, 0xA000)) for _ in range(6000)]
        pieces = (
            anything + plane_0 + chinese + [chr(i) for i in range(128)] * 40 + _EDGE_CASES * 100
        )
        yield ["".join(rng.choices(pieces, k=rng.randrange(25))) for _ in range(_CHUNK)]


def _scalar_value(number: int) -> int:
    return number if number < 0xD800 else number + 0x800


@pytest.mark.parametrize("num_strings", [40_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_random_unicode_round_trips_in_one_call_and_as_a_stream(
    tokenizer: Tokenizer, num_strings: int
) -> None:
    num_checked = 0
    stream = StreamingDetokenizer(tokenizer)
    for strings in random_strings(num_strings, num_strings):
        encoded = tokenizer.encode_batch(strings)
        for text, ids in zip(strings, encoded, strict=True):
            assert tokenizer.decode(ids) == text
            assert "".join(map(stream.push, ids)) == text  # no bytes remain at the end
            assert stream.finish() == ""
        assert not any(tokenizer.special_ids.intersection(ids) for ids in encoded)
        num_checked += len(strings)
    assert num_checked == num_strings


def test_the_strings_cover_every_plane() -> None:
    [strings] = random_strings(0, _CHUNK)
    planes = {ord(character) >> 16 for text in strings for character in text}
    assert planes == set(range(17))
