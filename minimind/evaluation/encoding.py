"""Encoding of prompts and answers for benchmarks."""

from collections.abc import Sequence
from typing import Protocol

from minimind.tokenizer import Tokenizer, encode_chat
from minimind.tokenizer.chat import Message


class PromptEncoder(Protocol):
    """Interface of the tokenizer functions that tasks need.

    text_start: token ids that precede every text; empty for some models. text_end: the token id
    that follows every text.
    """

    text_start: list[int]
    text_end: int

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of plain texts, without `text_start`."""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation, up to where the answer begins.

        Raises TokenizerError if the chat template rejects the messages.
        """

    def answer(self, text: str) -> list[int]:
        """Return the ids of an answer after a prompt, without the stop token."""


class MinimindEncoder:
    """Encoder based on `minimind.tokenizer`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.text_start = tokenizer.text_start
        self.text_end = tokenizer.end_of_text

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of plain texts, encoded on all cores."""
        return self._tokenizer.encode_batch(texts)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation in the model's chat format."""
        return encode_chat(self._tokenizer, messages, add_generation_prompt=True)[0]

    def answer(self, text: str) -> list[int]:
        """Return the supervised tokens of an assistant message, without the stop token."""
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
        ids, mask = encode_chat(self._tokenizer, messages)
        stops = self._tokenizer.stop_ids
        answer = [i for i, is_label in zip(ids, mask, strict=True) if is_label and i not in stops]
        return answer or self._tokenizer.encode(text)
