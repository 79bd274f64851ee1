"""Log-probabilities in OpenAI's two shapes."""

import codecs
from collections.abc import Iterable

from minimind.inference.requests import TokenLogprob
from minimind.serving import schema
from minimind.tokenizer import Tokenizer

_LEAST = -9999.0  # JSON has no infinity, and this is what OpenAI writes for it


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[TokenLogprob]) -> schema.ChatLogprobs:
    """For /v1/chat/completions."""
    return schema.ChatLogprobs(
        content=[
            schema.TokenLogprob(
                **_described(tokenizer, token.token_id, token.logprob),
                top_logprobs=[
                    schema.TopLogprob(**_described(tokenizer, *other)) for other in token.top
                ],
            )
            for token in tokens
        ]
    )


def completion_logprobs(
    tokenizer: Tokenizer,
    tokens: Iterable[TokenLogprob],
    offsets: "TextOffsets",
    first: int | None = None,
) -> schema.CompletionLogprobs:
    """For /v1/completions; `offsets` has seen the tokens before these.

    first: the token that an echoed prompt begins with, which has no probability.
    """
    found = schema.CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    if first is not None:
        found.tokens.append(_name(tokenizer, first))
        found.token_logprobs.append(None)
        found.top_logprobs.append(None)
        found.text_offset.append(offsets.push(first))
    for token in tokens:
        found.tokens.append(_name(tokenizer, token.token_id))
        found.token_logprobs.append(max(token.logprob, _LEAST))
        likeliest = [*token.top, (token.token_id, token.logprob)] if token.top else []
        found.top_logprobs.append(
            {_name(tokenizer, other): max(logprob, _LEAST) for other, logprob in likeliest}
        )
        found.text_offset.append(offsets.push(token.token_id))
    return found


class TextOffsets:
    """Where in the text of one answer, as it is shown, each of its tokens begins.

    hidden: characters at the beginning that are decoded and not shown, such as the space that some
    tokenizers put before a text.
    """

    def __init__(self, tokenizer: Tokenizer, hidden: int = 0) -> None:
        self._words = tokenizer.text_bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._length = -hidden

    def push(self, token: int) -> int:
        """The characters before the next token; one that it ends is not before it."""
        word = self._words[token]
        begun, _ = self._decoder.getstate()
        # A character that is never finished is shown as U+FFFD.
        begins = self._length + (bool(begun) and not _goes_on(begun, word[:1]))
        self._length += len(self._decoder.decode(word))
        return max(begins, 0)


def _goes_on(begun: bytes, byte: bytes) -> bool:
    """Whether the byte belongs to the character that has begun."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(begun + byte)
    except UnicodeDecodeError:
        return False
    return True


def _described(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, object]:
    word = tokenizer.bytes_of[token]
    text = word.decode("utf-8", errors="replace")
    return {"token": text, "logprob": max(logprob, _LEAST), "bytes": list(word)}


def _name(tokenizer: Tokenizer, token: int) -> str:
    """Its text; where that is a part of a character, its bytes."""
    word = tokenizer.bytes_of[token]
    try:
        return word.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in word)
