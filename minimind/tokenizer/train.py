"""Train a tokenizer on a bounded, uniform sample of a stream of texts."""

import heapq
from collections.abc import Iterable, Iterator

from tokenizers import pre_tokenizers, trainers

from minimind.errors import TokenizerError
from minimind.tokenizer.bpe import new_bpe, without_surrogates
from minimind.tokenizer.format import ROLES, SPECIAL_TOKENS
from minimind.tokenizer.tokenizer import Tokenizer

SAMPLE_MB = 12  # training takes about 100 bytes of memory per byte: less than 2 GB
_PIECE_LENGTH = 16_384  # characters, so that one long book cannot fill the sample


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int = 6400, sample_bytes: int = SAMPLE_MB << 20
) -> Tokenizer:
    """Train a byte-level BPE tokenizer with `vocab_size` tokens, or fewer if the texts are short.

    The same texts in the same order give the same tokenizer. Raises TokenizerError when
    `vocab_size` is too small for the bytes and control tokens, or when there is no text.
    """
    min_size = len(SPECIAL_TOKENS) + 256
    if vocab_size < min_size:
        raise TokenizerError(
            f"a vocabulary of {vocab_size} tokens is too small: the {len(SPECIAL_TOKENS)} control "
            f"tokens and the 256 bytes need {min_size}; use 6400, for example"
        )
    sample = sample_uniformly(texts, sample_bytes)
    if not sample:
        raise TokenizerError("there is no text to train a tokenizer on; give more data")
    # --8<-- [start:train]
    bpe = new_bpe()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # So each role of the chat format becomes one token; short dialogues take a third fewer tokens.
    headers = [f"{role}\n" for role in ROLES] * (sum(map(len, sample)) // 500)
    bpe.train_from_iterator([*sample, *headers], trainer)
    # --8<-- [end:train]
    return Tokenizer(bpe)


def sample_uniformly(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Sample pieces of the texts, all with the same probability, up to `max_bytes` of UTF-8.

    Reservoir sampling: each piece gets a pseudo-random key, and those with the smallest keys are
    kept, in order. Memory is bounded, and the length of the stream need not be known.
    """
    kept: list[tuple[int, int, str, int]] = []  # a heap of (-key, index, piece, bytes)
    size, ceiling = 0, 2**64
    for index, text in enumerate(_pieces(texts), 1):
        key = index * 0x9E3779B97F4A7C15 % 2**64  # Weyl sequence: uniform at any length
        if key >= ceiling:
            continue
        piece = without_surrogates(text)
        num_bytes = len(piece.encode())
        heapq.heappush(kept, (-key, index, piece, num_bytes))
        size += num_bytes
        while size > max_bytes and len(kept) > 1:
            dropped = heapq.heappop(kept)
            size, ceiling = size - dropped[3], -dropped[0]
    return [piece for _, _, piece, _ in sorted(kept, key=lambda item: item[1])]


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), _PIECE_LENGTH):
            yield text[start : start + _PIECE_LENGTH]
