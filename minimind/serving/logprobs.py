"""Log-probabilities in the formats of OpenAI's two endpoints."""

import codecs
from collections.abc import Iterable

from minimind.inference.requests import TokenLogprob
from minimind.serving import schema
from minimind.tokenizer import Tokenizer

_MIN_LOGPROB = -9999.0  # OpenAI's value for minus infinity, which JSON cannot represent


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[TokenLogprob]) -> schema.ChatLogprobs:
    """Format log-probabilities for /v1/chat/completions."""
    return schema.ChatLogprobs(
        content=[
            schema.TokenLogprob(
                **_chat_token(tokenizer, token.token_id, token.logprob),
                top_logprobs=[
                    schema.TopLogprob(**_chat_token(tokenizer, *candidate))
                    for candidate in token.top
                ],
            )
            for token in tokens
        ]
    )


def completion_logprobs(
    tokenizer: Tokenizer,
    tokens: Iterable[TokenLogprob],
    offsets: "TextOffsets",
    first_token: int | None = None,
) -> schema.CompletionLogprobs:
    """Format log-probabilities for /v1/completions.

    offsets: has been advanced past the tokens before these.
    first_token: the first token of an echoed prompt, which has no log-probability.
    """
    result = schema.CompletionLogprobs(
        tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[]
    )
    if first_token is not None:
        result.tokens.append(_token_text(tokenizer, first_token))
        result.token_logprobs.append(None)
        result.top_logprobs.append(None)
        result.text_offset.append(offsets.push(first_token))
    for token in tokens:
        result.tokens.append(_token_text(tokenizer, token.token_id))
        result.token_logprobs.append(max(token.logprob, _MIN_LOGPROB))
        candidates = [*token.top, (token.token_id, token.logprob)] if token.top else []
        result.top_logprobs.append(
            {_token_text(tokenizer, id): max(logprob, _MIN_LOGPROB) for id, logprob in candidates}
        )
        result.text_offset.append(offsets.push(token.token_id))
    return result


class TextOffsets:
    """Character offset of each token in the text of one answer.

    hidden: decoded characters at the start that the text omits, such as the space that some
    tokenizers put before a text.
    """

    def __init__(self, tokenizer: Tokenizer, hidden: int = 0) -> None:
        self._token_bytes = tokenizer.text_bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._length = -hidden

    def push(self, token: int) -> int:
        """Return the offset of the next token.

        A character split across tokens counts as part of the token that completes it.
        """
        data = self._token_bytes[token]
        partial, _ = self._decoder.getstate()
        # A partial character that this token does not continue has become U+FFFD.
        offset = self._length + (bool(partial) and not _continues(partial, data[:1]))
        self._length += len(self._decoder.decode(data))
        return max(offset, 0)


def _continues(partial: bytes, byte: bytes) -> bool:
    """Return True if the byte continues the partial UTF-8 character."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(partial + byte)
    except UnicodeDecodeError:
        return False
    return True


def _chat_token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, object]:
    data = tokenizer.bytes_of[token]
    text = data.decode("utf-8", errors="replace")
    return {"token": text, "logprob": max(logprob, _MIN_LOGPROB), "bytes": list(data)}


def _token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return the token's text, or `bytes:\\x..` for an incomplete character, as OpenAI does."""
    data = tokenizer.bytes_of[token]
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
