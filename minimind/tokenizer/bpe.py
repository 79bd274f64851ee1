"""Byte-level BPE (Sennrich et al. 2016, over bytes as in GPT-2), computed by `tokenizers`.

A token is a byte sequence. A regular expression first splits the text into pieces; merges never
cross their borders.
"""

import re
from collections.abc import Callable
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as BPE

from minimind.errors import TokenizerError

# --8<-- [start:split-pattern]
# The pattern of Qwen 2: llama.cpp knows it by name, and each digit is a token of its own.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# --8<-- [end:split-pattern]

_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
_SURROGATE = re.compile("[\ud800-\udfff]")


def new_bpe() -> BPE:
    """Return an untrained tokenizer with our split pattern and no normalizer."""
    bpe = BPE(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    return bpe


def load_bpe(directory: Path) -> BPE:
    """Read `tokenizer.json` of a tokenizer or model directory, of any origin.

    Truncation and padding that the file sets are switched off, so that a text is encoded complete.
    Raises TokenizerError when it is missing or damaged.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        problem = "is not a tokenizer directory: it has no tokenizer.json"
        if not directory.exists():
            problem = "does not exist"
        raise TokenizerError(
            f"{directory} {problem}. Train one with `minimind tokenizer train DATA --out DIR`"
        )
    try:
        bpe = BPE.from_str(path.read_text("utf-8"))
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from error
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # a bare Exception, or a Rust panic, which is not an Exception
        raise TokenizerError(
            f"{path}: not a tokenizer file, or damaged ({error}); copy it again or train a new one"
        ) from error
    bpe.no_truncation()
    bpe.no_padding()
    return bpe


def byte_encoder(bpe: BPE) -> Callable[[str], bytes]:
    """Return a function that maps a token string of the vocabulary to its bytes.

    Raises ValueError for a tokenizer whose tokens are not byte sequences.
    """
    if not isinstance(bpe.model, models.BPE):
        raise ValueError(f"its model is {type(bpe.model).__name__}")
    if bpe.model.byte_fallback:  # SentencePiece: U+2581 is a space, <0x0A> a byte

        def encode_piece(name: str) -> bytes:
            if _BYTE_TOKEN.fullmatch(name):
                return bytes([int(name[3:5], 16)])
            return name.replace("\u2581", " ").encode()

        return encode_piece
    if bpe.decoder is None or b'"ByteLevel"' not in bpe.decoder.__getstate__():
        raise ValueError("its decoder is not ByteLevel")
    # GPT-2's table: printable bytes are themselves, the others are U+0100 and up.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    return lambda name: bytes(byte_of[c] for c in name)


def without_surrogates(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, by U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)
