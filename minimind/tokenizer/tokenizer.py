"""`Tokenizer`: text to token ids and back, and the files of a tokenizer directory."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer as BPE

from minimind.errors import ResourceError, TokenizerError
from minimind.files import write_atomically
from minimind.tokenizer.bpe import byte_encoder, load_bpe, without_surrogates
from minimind.tokenizer.foreign import ForeignFiles, read_json
from minimind.tokenizer.format import CHAT_TEMPLATE, END_OF_TEXT, IM_END, IM_START
from minimind.tokenizer.template import ChatTemplate, SpecialToken, TextPosition


class Tokenizer:
    """Encode and decode text. Text never becomes a control token; those exist only as ids."""

    def __init__(self, bpe: BPE, foreign: ForeignFiles | None = None) -> None:
        """Wrap a `tokenizers.Tokenizer`. foreign: the files of a third-party tokenizer."""
        self._bpe, self._foreign = bpe, foreign
        added = bpe.get_added_tokens_decoder()
        self._visible_tags = {i for i, t in added.items() if not t.special and _is_tag(t.content)}
        # As special tokens, they are not recognized in text, see `encode_special_tokens` below.
        bpe.add_special_tokens([added[i].content for i in self._visible_tags])
        # `encode_special_tokens` encodes control tokens in text as plain text. Threads share the
        # tokenizer, so it is set once, after this probe, which needs it unset.
        name = bpe.id_to_token(min(self.special_ids, default=0)) or ""
        after_control = bpe.encode(f"{name}x", add_special_tokens=False).ids[1:]
        bpe.encode_special_tokens = True
        self._adds_space_after_control = after_control == self.encode("x")

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read the tokenizer of a tokenizer or model directory, trained here or third-party.

        Raises TokenizerError when it is missing, damaged or not supported: if it is not a BPE over
        bytes, or if it encodes some text as a control token.
        """
        path = directory / "tokenizer.json"
        bpe = load_bpe(directory)
        ids = sorted(bpe.get_vocab().values())
        if not ids or len(set(ids)) < len(ids) or ids[0] < 0 or ids[-1] >= 2 * len(ids):
            raise TokenizerError(
                f"{path}: the vocabulary has duplicate, negative or mostly unused token ids; "
                "copy it again or train a new one"
            )
        tokenizer = cls(bpe, None if _is_ours(directory, bpe) else ForeignFiles.read(directory))
        try:
            _ = tokenizer.bytes_of
        except (KeyError, ValueError) as error:
            raise TokenizerError(
                f"{path}: it is neither a byte-level BPE nor one with byte fallback ({error}); "
                "other tokenizers are not supported"
            ) from error
        tokenizer._check_control_tokens(path)
        return tokenizer

    def _check_control_tokens(self, path: Path) -> None:
        """Raise TokenizerError when text is encoded as a control token, or none ends a text."""
        names = [self._bpe.id_to_token(i) or "" for i in sorted(self.special_ids)]
        for name, ids in zip(names, self.encode_batch(names), strict=True):
            if not self.special_ids.isdisjoint(ids):
                raise TokenizerError(
                    f"{path}: text can be encoded as the control token {name!r}; such a tokenizer "
                    "is not supported"
                )
        _ = self.end_of_text, self.stop_ids, self.template

    def check_model(self, directory: Path, vocab_size: int) -> None:
        """Raise TokenizerError when a model of `vocab_size` tokens does not match this tokenizer.

        Third-party models may have a larger, padded embedding table; those trained here do not.
        """
        if self.vocab_size != vocab_size and (not self._foreign or self.vocab_size > vocab_size):
            raise TokenizerError(
                f"{directory}: its tokenizer.json has {self.vocab_size:,} tokens, but its model "
                f"has {vocab_size:,}, so they do not match; use the tokenizer that the model "
                "was trained with"
            )
        outside = [i for i in (self._foreign.eos_ids if self._foreign else ()) if i >= vocab_size]
        if outside:
            raise TokenizerError(
                f"{directory}: eos_token_id {outside[0]:,} is outside the model's vocabulary of "
                f"{vocab_size:,} tokens; fix generation_config.json or config.json"
            )

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja.

        The files of a third-party tokenizer are copied unchanged. If it came without a chat
        template and has our control tokens, our template is added, and generation_config.json,
        whose eos_token_id would be wrong, is left out. Raises ResourceError when the files cannot
        be written.
        """
        config = {
            # With any other class, some architectures give different ids.
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
                self._foreign.write(directory, with_generation_config=not self._gets_our_template)
                if self._gets_our_template:
                    write_atomically(directory / "chat_template.jinja", CHAT_TEMPLATE)
                return
            write_atomically(directory / "chat_template.jinja", CHAT_TEMPLATE)
            write_atomically(
                directory / "tokenizer_config.json",
                json.dumps(config, ensure_ascii=False, indent=2) + "\n",
            )
            write_atomically(directory / "tokenizer.json", self._json)
        except OSError as error:
            raise ResourceError(
                f"{directory}: cannot write the tokenizer here ({error.strerror}); "
                "free some disk space or give another directory"
            ) from error

    @cached_property
    def _json(self) -> str:
        return self._bpe.to_str(pretty=True)

    @cached_property
    def sha256(self) -> str:
        """Hash of the tokenizer and its chat format: equal hashes give equal ids."""
        if self._foreign:
            return self._foreign.sha256
        return hashlib.sha256(self._json.encode()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """Vocabulary size, control tokens included; all ids are smaller."""
        return max(self._bpe.get_vocab().values()) + 1

    @cached_property
    def token_ids(self) -> frozenset[int]:
        """All ids that have a token: those below `vocab_size`, unless the vocabulary has gaps."""
        return frozenset(self._bpe.get_vocab().values())

    @cached_property
    def end_of_text(self) -> int:
        """Id of the token between documents, which is also the padding token."""
        if (own := self._control_id(END_OF_TEXT)) is not None:
            return own
        assert self._foreign is not None, "our tokenizers have one"
        eos = self._control_id(self._foreign.token_names.get("eos_token", ""))
        candidates = [i for i in [*self._foreign.eos_ids, eos] if i in self.special_ids]
        if not candidates:
            raise TokenizerError(
                f"{self._foreign.directory}: there is no end-of-text token: neither "
                "generation_config.json nor tokenizer_config.json names a control token of "
                "tokenizer.json as eos_token_id or eos_token"
                f"{self._foreign.missing_files}"
            )
        return candidates[0]

    @cached_property
    def im_start(self) -> int:
        """Id of the token that opens a message in our chat format."""
        token = self._control_id(IM_START)
        assert token is not None
        return token

    @cached_property
    def im_end(self) -> int:
        """Id of the token that closes an answer."""
        token = self.template.end_of_answer() if self.template else self._control_id(IM_END)
        return self.end_of_text if token is None else token

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which generation stops: end of message (always first), end of text, EOS ids."""
        ids = [self.im_end, self.end_of_text]
        if self._foreign:
            eos = self._control_id(self._foreign.token_names.get("eos_token", ""))
            ids += [i for i in [*self._foreign.eos_ids, eos] if i is not None]
        return tuple(dict.fromkeys(ids))

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
        """True if the vocabulary has the control tokens of our chat format."""
        return None not in (self._control_id(IM_START), self._control_id(IM_END))

    @cached_property
    def _gets_our_template(self) -> bool:
        """True for a third-party tokenizer without a chat template that can use ours."""
        foreign = self._foreign
        return foreign is not None and foreign.template is None and self.has_chat_tokens

    @cached_property
    def template(self) -> ChatTemplate | None:
        """Chat template of a third-party tokenizer; None if it is ours or there is none.

        Raises TokenizerError when it cannot be read.
        """
        if not self._foreign or self._foreign.template in (None, CHAT_TEMPLATE):
            return None
        assert self._foreign.template is not None
        added = self._bpe.get_added_tokens_decoder()
        tokens = {
            added[i].content: SpecialToken(i, added[i].lstrip, added[i].rstrip)
            for i in self.special_ids
        }
        return ChatTemplate(self._foreign.template, self._foreign.token_names, tokens)

    @cached_property
    def text_start(self) -> list[int]:
        """Ids that precede every text, such as BOS: those that the post-processor adds."""
        text = "a"
        bare = self.encode(text)
        full = self._bpe.encode(text, add_special_tokens=True).ids
        return full[: full.index(bare[0])] if bare and bare[0] in full else []

    def _control_id(self, name: str) -> int | None:
        token = self._bpe.token_to_id(name)
        return token if token in self.special_ids else None

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of all control tokens."""
        added = self._bpe.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    @cached_property
    def bytes_of(self) -> list[bytes]:
        """Bytes that each token decodes to, [vocab_size]; for control tokens, their names.

        Raises KeyError or ValueError when tokens do not stand for bytes.
        """
        to_bytes = byte_encoder(self._bpe)
        added = self._bpe.get_added_tokens_decoder()
        names = [self._bpe.id_to_token(i) or "" for i in range(self.vocab_size)]
        return [name.encode() if i in added else to_bytes(name) for i, name in enumerate(names)]

    @cached_property
    def text_bytes_of(self) -> list[bytes]:
        """Bytes of text that each token stands for, [vocab_size]; empty for control tokens.

        Tags such as <think> that a third-party tokenizer does not mark as special count as text.
        """
        hidden = self.special_ids - self._visible_tags
        return [b"" if i in hidden else token for i, token in enumerate(self.bytes_of)]

    @cached_property
    def token_bytes(self) -> list[int]:
        """Number of bytes of text per token, [vocab_size]; 0 for control tokens."""
        return [len(token) for token in self.text_bytes_of]

    def encode(self, text: str) -> list[int]:
        """Encode plain text; what looks like a control token is encoded as text."""
        return self._bpe.encode(without_surrogates(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts on all cores."""
        clean = [without_surrogates(text) for text in texts]
        return [e.ids for e in self._bpe.encode_batch_fast(clean, add_special_tokens=False)]

    def encode_segments(self, segments: Sequence[tuple[str, TextPosition]]) -> list[list[int]]:
        """Encode texts at positions within a conversation, on all cores.

        SentencePiece tokenizers add a space before each text. A text that continues a line must not
        get one, so it is encoded with a line break in front, which is then removed.
        """
        standalone = {
            "never": ("start", "after_control", "inline"),
            "each": ("start", "after_control"),
        }.get(self._adds_space, ("start",))
        line_end = self.encode("\n")
        texts = [t if position in standalone or not t else f"\n{t}" for t, position in segments]
        encoded = self.encode_batch(texts)
        for index, (text, position) in enumerate(segments):
            if text and position not in standalone:
                is_separable = encoded[index][: len(line_end)] == line_end
                encoded[index] = (
                    encoded[index][len(line_end) :] if is_separable else self.encode(text)
                )
        return encoded

    @cached_property
    def _adds_space(self) -> Literal["never", "first", "each"]:
        """Texts that encoding adds a space to: none, the first, or each after a control token."""
        text = self.encode("x")
        if not b"".join(self.bytes_of[i] for i in text).startswith(b" "):
            return "never"
        return "each" if self._adds_space_after_control else "first"

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Decode ids. Invalid UTF-8 becomes U+FFFD; ids outside the vocabulary are skipped."""
        tokens = self.text_bytes_of if skip_special_tokens else self.bytes_of
        valid = range(len(tokens))
        return b"".join([tokens[i] for i in ids if i in valid]).decode("utf-8", errors="replace")


def _is_tag(name: str) -> bool:
    """True if an added token that is not marked special looks like a tag, not like a word."""
    return name.startswith(("<", "[")) and name.endswith((">", "]"))


def _is_ours(directory: Path, bpe: BPE) -> bool:
    """True if `Tokenizer.save` wrote the directory, or if nothing in it would be lost by saving."""
    special = {t.content: t.special for t in bpe.get_added_tokens_decoder().values()}
    if not all(special.get(name) for name in (END_OF_TEXT, IM_START, IM_END)):
        return False
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return all(special.values()) and not (directory / "chat_template.jinja").is_file()
    template = directory / "chat_template.jinja"
    if template.is_file() and template.read_bytes() != CHAT_TEMPLATE.encode():
        return False  # edited; transformers reads this file first
    return read_json(path, path.read_bytes()).get("chat_template") == CHAT_TEMPLATE
