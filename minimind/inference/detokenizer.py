"""Token ids to text while they come, without ever showing half a character."""

import codecs

from minimind.tokenizer import Tokenizer


class StreamingDetokenizer:
    """`Tokenizer.decode`, one id at a time: all that it returns, joined, is the same text."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False) -> None:
        self._words = tokenizer.text_bytes_of if skip_special_tokens else tokenizer.bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this id makes certain; bytes of an unfinished character wait."""
        if not 0 <= token_id < len(self._words):
            return ""
        return self._decoder.decode(self._words[token_id])

    def finish(self) -> str:
        """What still waits, as U+FFFD; then another text may begin."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
