"""Conversations that grow longer than a model's context."""

from bisect import bisect_left
from collections.abc import Sequence

from minimind.errors import UsageError
from minimind.tokenizer import Tokenizer, encode_chat
from minimind.tokenizer.chat import Message


def fit_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], most_tokens: int
) -> tuple[list[int], int]:
    """(prompt for the next answer, number of messages left out so that it has `most_tokens`).

    The oldest turns go first, the system message never. The last message is the user's. Raises
    UsageError when that one alone is too long.
    """
    system = [m for m in messages[:1] if m["role"] == "system"]
    turns = messages[len(system) :]
    starts = [i for i, message in enumerate(turns) if message["role"] == "user"]

    def prompt_from(start: int) -> list[int]:
        seen = [*system, *turns[start:]]
        return encode_chat(tokenizer, seen, add_generation_prompt=True)[0]

    # By halving: a long conversation is not to be encoded once for each of its turns.
    first = bisect_left(starts, True, key=lambda start: len(prompt_from(start)) <= most_tokens)
    if first < len(starts):
        return prompt_from(starts[first]), starts[first]
    prompt = prompt_from(starts[-1])
    length = len(tokenizer.encode(turns[-1]["content"]))
    others = len(prompt) - length
    if others >= most_tokens:
        raise UsageError(
            f"the chat format{' with the system message' if system else ''} takes {others:,} "
            f"tokens, and the prompt may have {most_tokens:,}: no message fits. Take a model of a "
            "longer context" + (", or a shorter system message" if system else "")
        )
    raise UsageError(
        f"the message has {length:,} tokens and at most {max(most_tokens - others, 0):,} fit: the "
        f"prompt may have {most_tokens:,}, of which {others:,} go to the chat format"
        + (" and the system message" if system else "")
        + ". Say it shorter"
    )
