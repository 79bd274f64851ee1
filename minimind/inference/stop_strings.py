"""Tokens to the text that is shown: no half characters, no part of a stop string."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from minimind.inference.detokenizer import StreamingDetokenizer
from minimind.tokenizer import Tokenizer

if TYPE_CHECKING:
    from minimind.inference.engine import TokenLogprob


class TextStream:
    """The text of one answer as it grows, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stop = [text for text in stop if text]
        self._detokenizer = StreamingDetokenizer(tokenizer, skip_special_tokens=True)
        self._waiting = ""  # text that may be the beginning of a stop string, or is not taken yet
        self._tokens: list[tuple[int, int, TokenLogprob | None]] = []  # and where its text begins
        self._sure = 0  # characters of `_waiting` that will be shown whatever comes

    def push(self, token: int, logprob: "TokenLogprob | None" = None) -> None:
        """Add a token."""
        self._tokens.append((len(self._waiting), token, logprob))
        self._add(self._detokenizer.push(token))

    def take(self) -> tuple[str, tuple[int, ...], tuple["TokenLogprob", ...]] | None:
        """What can be shown and was not yet: text, and tokens whose text begins in it."""
        if not self._sure:
            return None
        text, self._waiting = self._waiting[: self._sure], self._waiting[self._sure :]
        shown = [entry for entry in self._tokens if entry[0] < self._sure]
        self._tokens = [(at - self._sure, t, p) for at, t, p in self._tokens[len(shown) :]]
        self._sure = 0
        return text, tuple(e[1] for e in shown), tuple(e[2] for e in shown if e[2] is not None)

    def finish(self) -> tuple[str, tuple[int, ...], tuple["TokenLogprob", ...]]:
        """The rest, nothing of which is held back any more."""
        if not self.stopped:
            self._add(self._detokenizer.finish())
        if self.stopped:
            return self.take() or ("", (), ())
        text, shown = self._waiting, self._tokens
        self._waiting, self._tokens = "", []
        return text, tuple(e[1] for e in shown), tuple(e[2] for e in shown if e[2] is not None)

    def _add(self, text: str) -> None:
        self._waiting += text
        ends = [at for stop in self._stop if (at := self._waiting.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self._sure = min(ends)
        else:
            self._sure = len(self._waiting) - self._held_back()

    def _held_back(self) -> int:
        """The length of the longest end of the text that a stop string begins with."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._waiting)), longest, -1):
                if self._waiting.endswith(stop[:length]):
                    longest = length
                    break
        return longest
