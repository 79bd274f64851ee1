"""Prefix cache: prompt prefixes whose keys and values some slot of the KV cache still holds."""

from collections.abc import Collection, Sequence

from minimind.inference.batched_model import CHUNK


class PrefixCache:
    """Prompt tokens that each slot holds, in full chunks.

    A slot keeps its prefix when its sequence has finished, until another sequence takes the slot.
    """

    def __init__(self, slots: int) -> None:
        self._tokens: list[list[int]] = [[] for _ in range(slots)]

    def longest_match(self, prompt: Sequence[int], free_slots: Collection[int]) -> tuple[int, int]:
        """Return (slot, number of tokens) of the longest prefix; free slots win ties."""
        lengths = [shared_length(tokens, prompt) for tokens in self._tokens]
        slot = max(range(len(lengths)), key=lambda slot: (lengths[slot], slot in free_slots))
        return slot, lengths[slot]

    def replace(self, slot: int, tokens: Sequence[int]) -> None:
        """Set the prefix of a slot."""
        self._tokens[slot] = list(tokens)

    def extend(self, slot: int, chunk: Sequence[int]) -> None:
        """Append a full chunk to the prefix of a slot."""
        self._tokens[slot] += chunk

    def clear(self, slot: int) -> None:
        """Forget the prefix of a slot."""
        self._tokens[slot] = []


def shared_length(cached: Sequence[int], prompt: Sequence[int]) -> int:
    """Return the number of leading tokens in common, in full chunks.

    At least one prompt token is left to prefill: its logits give the next token.
    """
    most = min(len(cached), (len(prompt) - 1) // CHUNK * CHUNK)
    shared = 0
    while (
        shared < most and list(prompt[shared : shared + CHUNK]) == cached[shared : shared + CHUNK]
    ):
        shared += CHUNK
    return shared
