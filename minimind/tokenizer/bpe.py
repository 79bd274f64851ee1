"""The byte-level BPE tokenizer (Sennrich et al. 2016, over bytes as in GPT-2) and its files."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as BPE

from minimind.errors import ResourceError, TokenizerError
from minimind.tokenizer.foreign import ForeignFiles, read_json
from minimind.tokenizer.template import ChatTemplate, Control, Place

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

_BYTE = re.compile("<0x[0-9A-F]{2}>")
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

    def __init__(self, bpe: BPE, foreign: ForeignFiles | None = None) -> None:
        """`foreign`: the files of a tokenizer that was made elsewhere."""
        self._bpe, self._foreign = bpe, foreign
        added = bpe.get_added_tokens_decoder()
        self._shown = {i for i, t in added.items() if not t.special and _is_control(t.content)}
        # Text that spells a control token is then encoded like any other text.
        bpe.add_special_tokens([added[i].content for i in self._shown])
        bpe.no_padding()
        bpe.no_truncation()
        # The last moment at which this may be asked: `encode_special_tokens` protects from text
        # that spells a control token, and threads share the tokenizer, so it is never reset.
        name = bpe.id_to_token(min(self.special_ids, default=0)) or ""
        after = bpe.encode(f"{name}x", add_special_tokens=False).ids[1:]
        bpe.encode_special_tokens = True
        self._spaces_each = after == self.encode("x")

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read the tokenizer of a tokenizer or model directory, ours or one made elsewhere.

        Raises TokenizerError when it is missing, broken, or of a kind that is not supported: not
        a BPE over bytes, or one where text can spell a control token.
        """
        path = directory / "tokenizer.json"
        bpe = load_bpe(directory)
        ids = sorted(bpe.get_vocab().values())
        if not ids or len(set(ids)) < len(ids) or ids[0] < 0 or ids[-1] >= 2 * len(ids):
            raise TokenizerError(
                f"{path}: the ids of its words are not those of a vocabulary: two words share one, "
                "or most are of no word; copy it again, or train it again"
            )
        tokenizer = cls(bpe, None if _is_ours(directory, bpe) else ForeignFiles.read(directory))
        try:
            _ = tokenizer.bytes_of  # a word that is not made of bytes shows here
        except (KeyError, ValueError) as error:
            raise TokenizerError(
                f"{path}: it is not a byte-level BPE, nor one with byte fallback ({error}); "
                "only these are read"
            ) from error
        tokenizer._check_control_tokens(path)
        return tokenizer

    def _check_control_tokens(self, path: Path) -> None:
        """Raise TokenizerError when text could make one, or when there is none to end a text."""
        names = [self._bpe.id_to_token(i) or "" for i in sorted(self.special_ids)]
        for name, ids in zip(names, self.encode_batch(names), strict=True):
            if not self.special_ids.isdisjoint(ids):
                raise TokenizerError(f"{path}: text can spell the control token {name!r}")
        _ = self.end_of_text, self.stop_ids, self.template

    def check_model(self, directory: Path, vocab_size: int) -> None:
        """Raise TokenizerError when a model of `vocab_size` words is not one for this tokenizer.

        The embedding tables of others are often padded to a round number; ours never are.
        """
        if self.vocab_size != vocab_size and (not self._foreign or self.vocab_size > vocab_size):
            raise TokenizerError(
                f"{directory}: its tokenizer.json has {self.vocab_size:,} words and its model "
                f"{vocab_size:,}, so they do not belong together; use the tokenizer that the model "
                "was trained with"
            )
        outside = [i for i in (self._foreign.ends if self._foreign else ()) if i >= vocab_size]
        if outside:
            raise TokenizerError(
                f"{directory}: eos_token_id {outside[0]:,} is outside the model's {vocab_size:,} "
                "words; mend generation_config.json, or config.json"
            )

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja.

        A tokenizer made elsewhere is written as it was, generation_config.json included. Only
        where it came without a chat template, and ours serves, that is added, and where answers
        end is no longer what it was. Raises ResourceError when they cannot be written.
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
            if self._foreign:
                self._foreign.write(directory, chats=not self._lacks_template)
                if self._lacks_template:
                    _write(directory / "chat_template.jinja", CHAT_TEMPLATE)
                return
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
        """Names the tokenizer and its chat format: equal hashes give equal ids."""
        if self._foreign:
            return self._foreign.sha256
        return hashlib.sha256(self._json.encode()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """Words, control tokens included; ids are below it."""
        return max(self._bpe.get_vocab().values()) + 1

    @cached_property
    def token_ids(self) -> frozenset[int]:
        """Ids that have a token: all below `vocab_size`, except in a vocabulary with gaps."""
        return frozenset(self._bpe.get_vocab().values())

    @cached_property
    def end_of_text(self) -> int:
        """Id of the token between documents, which also pads."""
        if (found := self._control_id(END_OF_TEXT)) is not None:
            return found
        assert self._foreign is not None, "ours have one"
        eos = self._control_id(self._foreign.names.get("eos_token", ""))
        known = [i for i in [*self._foreign.ends, eos] if i in self.special_ids]
        if not known:
            raise TokenizerError(
                f"{self._foreign.directory}: no token ends a text: neither generation_config.json "
                "nor tokenizer_config.json names one (eos_token_id, eos_token) that is a control "
                f"token of tokenizer.json{self._foreign.missing}"
            )
        return known[0]

    @cached_property
    def im_start(self) -> int:
        """Id of the token that opens a message in our chat format."""
        found = self._control_id(IM_START)
        assert found is not None
        return found

    @cached_property
    def im_end(self) -> int:
        """Id of the token that closes a message."""
        found = self.template.end_of_answer() if self.template else self._control_id(IM_END)
        return self.end_of_text if found is None else found

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which a model ends what it writes: a message, a document, and what its files say.

        The first closes a message.
        """
        own = [self.im_end, self.end_of_text]
        if self._foreign:
            eos = self._control_id(self._foreign.names.get("eos_token", ""))
            own += [i for i in [*self._foreign.ends, eos] if i is not None]
        return tuple(dict.fromkeys(own))

    @cached_property
    def model_ids(self) -> dict[str, Any]:
        """`bos_token_id`, `eos_token_id` and `pad_token_id` for a model's config.json."""
        ours = {
            "bos_token_id": None,
            "eos_token_id": self.im_end,
            "pad_token_id": self.end_of_text,
        }
        return ours | dict(self._foreign.model_ids) if self._foreign else ours

    @cached_property
    def has_chat_tokens(self) -> bool:
        """Whether our chat format can be written."""
        return None not in (self._control_id(IM_START), self._control_id(IM_END))

    @cached_property
    def _lacks_template(self) -> bool:
        """Whether ours is the first chat format that this tokenizer gets."""
        foreign = self._foreign
        return foreign is not None and foreign.template is None and self.has_chat_tokens

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The chat format of a tokenizer made elsewhere; None where it is ours, or there is none.

        Raises TokenizerError when it cannot be read.
        """
        from minimind.tokenizer.chat import CHAT_TEMPLATE

        if not self._foreign or self._foreign.template in (None, CHAT_TEMPLATE):
            return None
        assert self._foreign.template is not None
        added = self._bpe.get_added_tokens_decoder()
        controls = {
            added[i].content: Control(i, added[i].lstrip, added[i].rstrip) for i in self.special_ids
        }
        return ChatTemplate(self._foreign.template, self._foreign.names, controls)

    @cached_property
    def text_start(self) -> list[int]:
        """Ids before every text, such as a BOS: what the tokenizer's post-processor puts there."""
        text = "a"
        bare = self.encode(text)
        full = self._bpe.encode(text, add_special_tokens=True).ids
        return full[: full.index(bare[0])] if bare and bare[0] in full else []

    def _control_id(self, name: str) -> int | None:
        found = self._bpe.token_to_id(name)
        return found if found in self.special_ids else None

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of all control tokens."""
        added = self._bpe.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    @cached_property
    def bytes_of(self) -> list[bytes]:
        """[vocab_size] the bytes that each token is decoded to; for control tokens their name.

        Raises KeyError or ValueError when words are not made of bytes.
        """
        as_bytes = _word_bytes(self._bpe)
        added = self._bpe.get_added_tokens_decoder()
        names = [self._bpe.id_to_token(i) or "" for i in range(self.vocab_size)]
        return [name.encode() if i in added else as_bytes(name) for i, name in enumerate(names)]

    @cached_property
    def text_bytes_of(self) -> list[bytes]:
        """[vocab_size] the bytes of text that each token stands for; none for control tokens.

        Tags that others do not call special, such as <think>, are shown: they are for people.
        """
        hidden = self.special_ids - self._shown
        return [b"" if i in hidden else word for i, word in enumerate(self.bytes_of)]

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

    def encode_sections(self, sections: Sequence[tuple[str, Place]]) -> list[list[int]]:
        """Ids of texts of which each stands at a place of a conversation, on all cores.

        Some tokenizers put a space before a text; where it goes on in a line there is none.
        """
        fresh = {"never": ("start", "section", "middle"), "each": ("start", "section")}
        alone = fresh.get(self._adds_space, ("start",))
        line_end = self.encode("\n")
        texts = [text if place in alone or not text else f"\n{text}" for text, place in sections]
        encoded = self.encode_batch(texts)
        for at, (text, place) in enumerate(sections):
            if text and place not in alone:
                apart = encoded[at][: len(line_end)] == line_end
                encoded[at] = encoded[at][len(line_end) :] if apart else self.encode(text)
        return encoded

    @cached_property
    def _adds_space(self) -> Literal["never", "first", "each"]:
        """Whether a space is put before no text, the first one, or each after a control token."""
        text = self.encode("x")
        if not b"".join(self.bytes_of[i] for i in text).startswith(b" "):
            return "never"
        return "each" if self._spaces_each else "first"

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


def _is_control(name: str) -> bool:
    """Whether an added token that is not marked "special" is a tag, and not a word of text."""
    return name.startswith(("<", "[")) and name.endswith((">", "]"))


def _is_ours(directory: Path, bpe: BPE) -> bool:
    """Whether the directory is as `Tokenizer.save` writes it, or holds nothing else to keep."""
    from minimind.tokenizer.chat import CHAT_TEMPLATE

    special = {t.content: t.special for t in bpe.get_added_tokens_decoder().values()}
    if not all(special.get(name) for name in (END_OF_TEXT, IM_START, IM_END)):
        return False
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return all(special.values()) and not (directory / "chat_template.jinja").is_file()
    template = directory / "chat_template.jinja"
    if template.is_file() and template.read_bytes() != CHAT_TEMPLATE.encode():
        return False  # somebody has edited it, and transformers goes by this file
    return read_json(path, path.read_bytes()).get("chat_template") == CHAT_TEMPLATE


def _word_bytes(bpe: BPE) -> Callable[[str], bytes]:
    """How a word is written as bytes. Raises ValueError for a tokenizer that is not over bytes."""
    if not isinstance(bpe.model, models.BPE):
        raise ValueError(f"it is a {type(bpe.model).__name__}")
    if bpe.model.byte_fallback:  # as SentencePiece does: U+2581 is a space, <0x0A> a byte

        def piece(name: str) -> bytes:
            if _BYTE.fullmatch(name):
                return bytes([int(name[3:5], 16)])
            return name.replace("\u2581", " ").encode()

        return piece
    if bpe.decoder is None or b'"ByteLevel"' not in bpe.decoder.__getstate__():
        raise ValueError("its decoder is not ByteLevel")
    byte_of = _byte_of_character()
    return lambda name: bytes(byte_of[c] for c in name)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
