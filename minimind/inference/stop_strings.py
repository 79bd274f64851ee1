"""Stop strings: stream the text of a completion without ever showing part of one."""

from collections.abc import Sequence
from typing import NamedTuple

from minimind.inference.detokenizer import StreamingDetokenizer
from minimind.inference.requests import TokenLogprob
from minimind.tokenizer import Tokenizer


class _Token(NamedTuple):
    start: int  # of its text in the buffer
    id: int
    logprob: TokenLogprob | None


class TextStream:
    """The text of one completion, up to the first stop string.

    Text that may be the start of a stop string is held back until more tokens decide it, as are
    bytes of an incomplete character.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stop = [text for text in stop if text]
        self._detokenizer = StreamingDetokenizer(tokenizer, skip_special_tokens=True)
        self._buffer = ""  # text that was not taken yet
        self._tokens: list[_Token] = []
        self._ready = 0  # leading characters of the buffer that cannot belong to a stop string

    def push(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Append a token."""
        self._tokens.append(_Token(len(self._buffer), token, logprob))
        self._append(self._detokenizer.push(token))

    def take(self) -> tuple[str, tuple[int, ...], tuple[TokenLogprob, ...]] | None:
        """Remove and return the text that is ready, with the tokens whose text starts in it."""
        if not self._ready:
            return None
        text, self._buffer = self._buffer[: self._ready], self._buffer[self._ready :]
        taken = [token for token in self._tokens if token.start < self._ready]
        rest = self._tokens[len(taken) :]
        self._tokens = [token._replace(start=token.start - self._ready) for token in rest]
        self._ready = 0
        return text, *_split(taken)

    def finish(self) -> tuple[str, tuple[int, ...], tuple[TokenLogprob, ...]]:
        """Return the rest of the text and its tokens, without a stop string."""
        if not self.stopped:
            self._append(self._detokenizer.finish())
        if self.stopped:
            return self.take() or ("", (), ())
        text, tokens = self._buffer, self._tokens
        self._buffer, self._tokens = "", []
        return text, *_split(tokens)

    def _append(self, text: str) -> None:
        self._buffer += text
        starts = [start for stop in self._stop if (start := self._buffer.find(stop)) >= 0]
        if starts:
            self.stopped = True
            self._ready = min(starts)
        else:
            self._ready = len(self._buffer) - self._partial_stop_length()

    def _partial_stop_length(self) -> int:
        """Return the length of the longest suffix of the buffer that starts a stop string."""
        # --8<-- [start:partial-stop]
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._buffer)), longest, -1):
                if self._buffer.endswith(stop[:length]):
                    longest = length
                    break
        return longest
        # --8<-- [end:partial-stop]


def _split(tokens: Sequence[_Token]) -> tuple[tuple[int, ...], tuple[TokenLogprob, ...]]:
    """Return the ids and the log-probabilities of tokens."""
    logprobs = tuple(token.logprob for token in tokens if token.logprob is not None)
    return tuple(token.id for token in tokens), logprobs
