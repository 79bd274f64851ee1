"""The byte-level BPE tokenizer (Sennrich et al. 2016, over bytes as in GPT-2) and its files."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as BPE

from minimind.errors import ResourceError, TokenizerError

END_OF_TEXT = "<|endoftext|>"  # stands between documents, and pads
IM_START, IM_END = "<|im_start|>", "<|im_end|>"  # around each message
_THINKING_AND_TOOLS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
_THINKING_AND_TOOLS += ["<tool_response>", "</tool_response>"]
_NUM_SPECIAL = 16
SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END, *_THINKING_AND_TOOLS]
SPECIAL_TOKENS += [f"<|reserved_{i}|>" for i in range(_NUM_SPECIAL - len(SPECIAL_TOKENS))]

# Qwen 2's: llama.cpp knows it by name, and digits stay apart.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SURROGATE = re.compile("[\ud800-\udfff]")


def new_bpe() -> BPE:
    """An untrained tokenizer with our split pattern and no normalizer."""
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
    """Read `tokenizer.json` of any tokenizer or model directory, ours or not.

    Raises TokenizerError when it is missing or broken.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(
            f"{directory} is not a tokenizer directory: it has no tokenizer.json. "
            "Make one with `minimind tokenizer train DATA --out DIR`"
        )
    try:
        return BPE.from_str(path.read_text("utf-8"))
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from error
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # bare Exception, and a panic in Rust is not even that
        raise TokenizerError(
            f"{path}: is not a tokenizer, or a damaged one ({error}); "
            "copy it again, or train it again"
        ) from error


class Tokenizer:
    """Text to ids and back. Control tokens are never made from text, only by their ids."""

    def __init__(self, bpe: BPE) -> None:
        self._bpe = bpe
        # Text that spells a control token is then encoded like any other text.
        bpe.encode_special_tokens = True
        bpe.no_padding()
        bpe.no_truncation()

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read the tokenizer of a tokenizer or model directory.

        Raises TokenizerError when it is missing, broken, or of a kind that cannot hold the chat
        format: without our control tokens, with added words that text could spell, or not over
        bytes.
        """
        path = directory / "tokenizer.json"
        bpe = load_bpe(directory)
        if missing := [t for t in (END_OF_TEXT, IM_START, IM_END) if bpe.token_to_id(t) is None]:
            raise TokenizerError(
                f"{path}: it has no {', '.join(missing)}, which the chat format needs; "
                "use a tokenizer made by `minimind tokenizer train`"
            )
        added = bpe.get_added_tokens_decoder().values()
        if loose := [token.content for token in added if not token.special]:
            raise TokenizerError(
                f'{path}: the added token {loose[0]!r} is not marked "special", so text could '
                f"spell it ({len(loose)} such); mark it in added_tokens if it is a control token"
            )
        if sorted(bpe.get_vocab().values()) != list(range(bpe.get_vocab_size())):
            raise TokenizerError(
                f"{path}: the ids of its words do not run from 0 without gaps; "
                "copy it again, or train it again"
            )
        tokenizer = cls(bpe)
        try:
            _ = tokenizer.bytes_of  # a word that is not made of bytes shows here
        except KeyError as error:
            raise TokenizerError(
                f"{path}: it is not a byte-level BPE (a word holds {error}); "
                "use a tokenizer made by `minimind tokenizer train`"
            ) from error
        return tokenizer

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja.

        Raises ResourceError when they cannot be written.
        """
        from minimind.tokenizer.chat import CHAT_TEMPLATE  # which itself needs this module

        config = {
            # With any other class some architectures give different ids.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": IM_END,
            "pad_token": END_OF_TEXT,
            "bos_token": None,
            "unk_token": None,
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 10**9,
            "chat_template": CHAT_TEMPLATE,
        }
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _write(directory / "chat_template.jinja", CHAT_TEMPLATE)
            _write(
                directory / "tokenizer_config.json",
                json.dumps(config, ensure_ascii=False, indent=2) + "\n",
            )
            _write(directory / "tokenizer.json", self._json)
        except OSError as error:
            raise ResourceError(
                f"{directory}: cannot write the tokenizer here ({error.strerror}); "
                "free some space or give another folder"
            ) from error

    @cached_property
    def _json(self) -> str:
        return self._bpe.to_str(pretty=True)

    @cached_property
    def sha256(self) -> str:
        """Names the tokenizer: equal hashes give equal ids."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """Words, control tokens included; ids are below it."""
        return self._bpe.get_vocab_size()

    @cached_property
    def end_of_text(self) -> int:
        """Id of the token between documents, which also pads."""
        return self._id(END_OF_TEXT)

    @cached_property
    def im_start(self) -> int:
        """Id of the token that opens a message."""
        return self._id(IM_START)

    @cached_property
    def im_end(self) -> int:
        """Id of the token that closes a message."""
        return self._id(IM_END)

    def _id(self, control_token: str) -> int:
        found = self._bpe.token_to_id(control_token)
        assert found is not None
        return found

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of all control tokens."""
        return frozenset(self._bpe.get_added_tokens_decoder())

    @cached_property
    def bytes_of(self) -> list[bytes]:
        """[vocab_size] the bytes that each token is decoded to; for control tokens their name."""
        byte_of = _byte_of_character()
        names = [self._bpe.id_to_token(i) or "" for i in range(self.vocab_size)]
        return [
            name.encode() if i in self.special_ids else bytes(byte_of[c] for c in name)
            for i, name in enumerate(names)
        ]

    @cached_property
    def text_bytes_of(self) -> list[bytes]:
        """[vocab_size] the bytes of text that each token stands for; none for control tokens."""
        return [b"" if i in self.special_ids else word for i, word in enumerate(self.bytes_of)]

    @cached_property
    def token_bytes(self) -> list[int]:
        """[vocab_size] how many bytes of text each token stands for; 0 for control tokens."""
        return [len(word) for word in self.text_bytes_of]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; what looks like a control token is text too."""
        return self._bpe.encode(without_surrogates(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        clean = [without_surrogates(text) for text in texts]
        return [e.ids for e in self._bpe.encode_batch_fast(clean, add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD, ids of no token become nothing."""
        words = self.text_bytes_of if skip_special_tokens else self.bytes_of
        known = range(len(words))
        return b"".join([words[i] for i in ids if i in known]).decode("utf-8", errors="replace")


def without_surrogates(text: str) -> str:
    """Half a UTF-16 pair is not a character and has no UTF-8; U+FFFD stands in for it."""
    return _SURROGATE.sub("\ufffd", text)


def _write(path: Path, text: str) -> None:
    """Whole or not at all: an interrupted run must not leave half a file."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
