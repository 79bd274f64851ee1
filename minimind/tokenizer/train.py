"""Training a tokenizer on a bounded, even sample of a stream of texts."""

import heapq
from collections.abc import Iterable, Iterator

from tokenizers import pre_tokenizers, trainers

from minimind.errors import TokenizerError
from minimind.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer, new_bpe, without_surrogates
from minimind.tokenizer.chat import ROLES

SAMPLE_MB = 12  # training takes about 100 bytes of memory for each byte: under 2 GB in all
_PIECE = 16_384  # characters: a long book must not crowd out everything else


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int = 6400, sample_bytes: int = SAMPLE_MB << 20
) -> Tokenizer:
    """A byte-level BPE tokenizer with `vocab_size` words (fewer if the texts hold no more).

    The same texts in the same order give the same tokenizer. Raises TokenizerError when the
    vocabulary is smaller than bytes and special tokens need, or when there is no text.
    """
    least = len(SPECIAL_TOKENS) + 256
    if vocab_size < least:
        raise TokenizerError(
            f"a vocabulary of {vocab_size} is too small: {least} words are the "
            f"{len(SPECIAL_TOKENS)} control tokens and the 256 bytes; 6400 is usual"
        )
    sample = sample_evenly(texts, sample_bytes)
    if not sample:
        raise TokenizerError("there is no text to train a tokenizer on; give more data")
    bpe = new_bpe()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Each role of the chat format becomes one word: in short dialogues that saves a third.
    openings = [f"{role}\n" for role in ROLES] * (sum(map(len, sample)) // 500)
    bpe.train_from_iterator([*sample, *openings], trainer)
    return Tokenizer(bpe)


def sample_evenly(texts: Iterable[str], most_bytes: int) -> list[str]:
    """Pieces of the texts, each as likely as any other, at most `most_bytes` of UTF-8 in all.

    Each piece draws a pseudo-random number; those with the smallest stay, in their order. So the
    sample of a longer stream is as even as that of a short one, and memory is bounded.
    """
    kept: list[tuple[int, int, str, int]] = []  # a heap of (-number, place, piece, bytes)
    size, ceiling = 0, 2**64
    for place, text in enumerate(_pieces(texts), 1):
        number = place * 0x9E3779B97F4A7C15 % 2**64  # Weyl sequence: even at any length
        if number >= ceiling:
            continue
        piece = without_surrogates(text)
        num_bytes = len(piece.encode())
        heapq.heappush(kept, (-number, place, piece, num_bytes))
        size += num_bytes
        while size > most_bytes and len(kept) > 1:
            dropped = heapq.heappop(kept)
            size, ceiling = size - dropped[3], -dropped[0]
    return [piece for _, _, piece, _ in sorted(kept, key=lambda item: item[1])]


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for at in range(0, len(text), _PIECE):
            yield text[at : at + _PIECE]
