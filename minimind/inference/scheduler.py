"""Scheduler: which requests hold a slot, and which tokens a step prefills.

Continuous batching (Yu et al. 2022, Orca): sequences join and leave the batch at any step. Requests
are admitted first come, first served. A long prompt is prefilled over several steps, so that
decoding sequences do not stall. A request whose prompt shares more with a prompt that is being
prefilled than with any cached one waits for it.
"""

import threading
from collections import deque
from collections.abc import Sequence
from itertools import islice

import torch

from minimind.inference.batched_model import CHUNK, BatchedModel, Part
from minimind.inference.prefix_cache import PrefixCache, shared_length
from minimind.inference.requests import Completion, Request, ScoreRequest
from minimind.inference.sequences import (
    ActiveSequence,
    GeneratingSequence,
    PrefillChunk,
    ScoringSequence,
    is_decoding,
)
from minimind.tokenizer import Tokenizer

PREFILL_TOKENS_WHILE_DECODING = 4 * CHUNK  # per step; bounds the time between decoded tokens
PREFILL_TOKENS_IDLE = 8 * CHUNK  # per step while nothing decodes; a CPU gains nothing from more
PREFILL_TOKENS_IDLE_GPU = 32 * CHUNK
MAX_LOGITS = 1 << 24  # elements that a step prefills, unless a single chunk needs more


class Scheduler:
    """Assigns slots to requests and chooses what each step prefills.

    lock: held to change `waiting`, `active` and `free_slots`, and to read them from other threads.
    Only the engine's thread changes them, but for appending to `waiting`.
    """

    def __init__(
        self, model: BatchedModel, tokenizer: Tokenizer, lock: threading.Condition
    ) -> None:
        self.waiting: deque[Completion] = deque()
        self.active: list[ActiveSequence] = []
        self.free_slots = list(range(model.slots))  # least recently used first
        self._model, self._tokenizer, self._lock = model, tokenizer, lock
        self._prefix_cache = PrefixCache(model.slots)

    def drop_waiting(self, *, everything: bool) -> list[Completion]:
        """Remove cancelled requests, or all of them, from the queue and return them.

        Call it with the lock held.
        """
        dropped = [c for c in self.waiting if c.is_cancelled or everything]
        for completion in dropped:
            self.waiting.remove(completion)
        return dropped

    def admit(self) -> None:
        """Start waiting requests in free slots."""
        with self._lock:
            first = list(islice(self.waiting, self._model.slots))
        for completion in first:
            if not self.free_slots:
                break
            self._start(completion)

    def _start(self, completion: Completion) -> None:
        """Give a request a slot and a cached prefix, unless it waits for a longer prefix."""
        request = completion.request
        prompt = request.prompt
        source = num_cached = 0
        if self._uses_prefix_cache(request):
            source, num_cached = self._prefix_cache.longest_match(prompt, self.free_slots)
            pending = map(self._pending_prefix, self.active)
            if any(shared_length(tokens, prompt) > num_cached for tokens in pending):
                return
        slot = source if num_cached and source in self.free_slots else self.free_slots[0]
        try:
            sequence = self._new_sequence(completion, slot, num_cached)
        except torch.AcceleratorError:
            raise
        except BaseException as error:  # of this request alone, such as a panic in the tokenizer
            with self._lock:
                self.waiting.remove(completion)
            completion.fail(error)
            return
        if slot != source and num_cached:
            self._model.cache.copy_prefix(source, slot, num_cached)
        self._prefix_cache.replace(slot, prompt[:num_cached])
        completion.cached_tokens = num_cached
        with self._lock:
            self.waiting.remove(completion)
            self.free_slots.remove(slot)
            self.active.append(sequence)

    def _new_sequence(self, completion: Completion, slot: int, num_cached: int) -> ActiveSequence:
        request = completion.request
        if isinstance(request, ScoreRequest):
            return ScoringSequence(completion, slot, num_cached, request)
        return GeneratingSequence(
            completion, slot, num_cached, request, self._model, self._tokenizer
        )

    def _uses_prefix_cache(self, request: Request | ScoreRequest) -> bool:
        """Return False where cached logits are missing or keys depend on the sequence length."""
        if isinstance(request, ScoreRequest):
            return self._model.prefix_cacheable(request.input_length)
        return request.prompt_logprobs is None and self._model.prefix_cacheable(len(request.prompt))

    def _pending_prefix(self, sequence: ActiveSequence) -> Sequence[int]:
        """Return the tokens that a sequence will add to the prefix cache."""
        if not sequence.to_prefill:
            return ()
        length = sequence.to_prefill[0].part.sequence_length
        return sequence.prompt if self._model.prefix_cacheable(length) else ()

    def next_prefill(self) -> list[tuple[ActiveSequence, PrefillChunk]]:
        """Take the chunks that this step prefills, in order of admission, within the budget."""
        chunks: list[tuple[ActiveSequence, PrefillChunk]] = []
        budget = self._prefill_budget()
        tokens = logits = 0
        for sequence in self.active:
            end = 0
            # Continuations of one prompt use the same positions, so each takes a separate step.
            while sequence.to_prefill and (part := sequence.to_prefill[0].part).start >= end:
                end = part.start + len(part.tokens)
                tokens += len(part.tokens)
                logits += part.logits_for_last * self._model.vocab_size
                if chunks and (tokens > budget or logits > MAX_LOGITS):
                    return chunks
                chunks.append((sequence, sequence.to_prefill.popleft()))
                sequence.cache_length = max(sequence.cache_length, end)
        return chunks

    def _prefill_budget(self) -> int:
        """Return the number of tokens that a step may prefill."""
        if any(map(is_decoding, self.active)):
            return PREFILL_TOKENS_WHILE_DECODING
        if self._model.device.type == "cpu":
            return PREFILL_TOKENS_IDLE
        return PREFILL_TOKENS_IDLE_GPU

    def cache_prefix(self, sequence: ActiveSequence, part: Part) -> None:
        """Add a prefilled part to the prefix cache if it is a full chunk of a prompt."""
        is_full = len(part.tokens) == CHUNK and part.start + CHUNK <= len(sequence.prompt)
        if is_full and self._model.prefix_cacheable(part.sequence_length):
            self._prefix_cache.extend(sequence.slot, part.tokens)

    def release(self, sequence: ActiveSequence) -> None:
        """Free the slot of a sequence."""
        with self._lock:
            self.active.remove(sequence)
            self.free_slots.append(sequence.slot)

    def release_damaged(self, sequence: ActiveSequence) -> None:
        """Free the slot of a failed sequence, whose keys and values may not be finite."""
        # First: when the device fails here, all requests have to end with that error.
        self._model.cache.clear(sequence.slot, sequence.cache_length)
        self.release(sequence)
        self._prefix_cache.clear(sequence.slot)

    def remove_all(self) -> list[Completion]:
        """Remove all requests and return them, without touching the device.

        Call it with the lock held.
        """
        removed = [*(sequence.completion for sequence in self.active), *self.waiting]
        self.active.clear()
        self.waiting.clear()
        return removed
