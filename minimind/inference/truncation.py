"""Truncation of conversations that are longer than the context."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import takewhile

from minimind.errors import UsageError
from minimind.tokenizer import Tokenizer, encode_chat
from minimind.tokenizer.chat import Message


def truncate_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], max_tokens: int
) -> tuple[list[int], int]:
    """Return (prompt of at most `max_tokens` tokens, number of messages dropped to reach it).

    The oldest turns are dropped first, system messages at the beginning never. The last message
    must be the user's. Raises UsageError when it does not fit alone, and when the user has none.
    """
    system = list(takewhile(lambda message: message["role"] == "system", messages))
    turns = messages[len(system) :]
    users = [i for i, message in enumerate(turns) if message["role"] == "user"]
    if not users:
        raise UsageError("the conversation has no message of the user")
    starts = sorted({0, *users})  # 0 also if the conversation opens with an answer

    def prompt_from(start: int) -> list[int]:
        kept = [*system, *turns[start:]]
        return encode_chat(tokenizer, kept, add_generation_prompt=True)[0]

    # Binary search, to encode a long conversation a few times and not once per turn.
    first = bisect_left(starts, True, key=lambda start: len(prompt_from(start)) <= max_tokens)
    if first < len(starts):
        return prompt_from(starts[first]), starts[first]
    length = len(tokenizer.encode(turns[-1]["content"]))
    overhead = len(prompt_from(starts[-1])) - length
    if overhead >= max_tokens:
        raise UsageError(
            f"the chat template{' with the system message' if system else ''} takes {overhead:,} "
            f"tokens and the prompt may have {max_tokens:,}: no message fits. Use a model with a "
            "longer context" + (", or a shorter system message" if system else "")
        )
    raise UsageError(
        f"the message has {length:,} tokens and at most {max_tokens - overhead:,} fit: the prompt "
        f"may have {max_tokens:,}, of which {overhead:,} go to the chat template"
        + (" and the system message" if system else "")
        + ". Shorten the message"
    )
