"""Conversations that grow longer than a model's context."""

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
    for start in starts:
        seen = [*system, *turns[start:]]
        prompt, _ = encode_chat(tokenizer, seen, add_generation_prompt=True)
        if len(prompt) <= most_tokens:
            return prompt, start
    length = len(tokenizer.encode(turns[-1]["content"]))
    others = len(prompt) - length
    raise UsageError(
        f"the message has {length:,} tokens and at most {max(most_tokens - others, 0):,} fit: the "
        f"prompt may have {most_tokens:,}, of which {others:,} go to the chat format"
        + (" and the system message" if system else "")
        + ". Say it shorter"
    )
