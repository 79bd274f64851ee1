"""What an examination needs of a tokenizer: plain text, prompts, and the beginning of answers."""

from collections.abc import Sequence
from typing import Protocol

from minimind.tokenizer import Tokenizer, encode_chat
from minimind.tokenizer.chat import Message


class PromptEncoder(Protocol):
    """text_start: ids before every text, none with some models. text_end: what ends one."""

    text_start: list[int]
    text_end: int

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of plain texts."""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation that is to be answered. Raises TokenizerError where none can be."""

    def answer(self, text: str) -> list[int]:
        """Ids of an answer as they stand after a prompt, without what ends it."""


class OwnPromptEncoder:
    """By our own reading of a tokenizer's files."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.text_start = tokenizer.text_start
        self.text_end = tokenizer.end_of_text

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """On all cores."""
        return self._tokenizer.encode_batch(texts)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """In the model's chat format."""
        return encode_chat(self._tokenizer, messages, add_generation_prompt=True)[0]

    def answer(self, text: str) -> list[int]:
        """What a model is to produce for it, its end apart."""
        talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
        ids, mask = encode_chat(self._tokenizer, talk)
        stops = self._tokenizer.stop_ids
        own = [i for i, learned in zip(ids, mask, strict=True) if learned and i not in stops]
        return own or self._tokenizer.encode(text)
