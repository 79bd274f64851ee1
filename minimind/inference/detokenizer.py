"""Incremental detokenization: ids to text, one at a time, in complete characters."""

import codecs

from minimind.tokenizer import Tokenizer


class StreamingDetokenizer:
    """`Tokenizer.decode` one id at a time: the strings it returns join to the same text."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False) -> None:
        self._token_bytes = tokenizer.text_bytes_of if skip_special_tokens else tokenizer.bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the characters that this id completes."""
        if not 0 <= token_id < len(self._token_bytes):
            return ""
        return self._decoder.decode(self._token_bytes[token_id])

    def finish(self) -> str:
        """Return an incomplete character as U+FFFD, and reset."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
