"""Active sequences: requests that hold a slot of the KV cache, and their state."""

import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.inference.batched_model import CHUNK, BatchedModel, Part
from minimind.inference.requests import Completion, Request, ScoreRequest, TokenLogprob
from minimind.inference.sampling import Penalties
from minimind.inference.stop_strings import TextStream
from minimind.tokenizer import Tokenizer


class ScoreTarget(NamedTuple):
    """A token to score: its logits, its id, and the continuation that it belongs to."""

    logit_row: int
    token: int
    continuation: int


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens of a sequence to prefill. targets: what its logits score, for a ScoreRequest."""

    part: Part
    targets: Sequence[ScoreTarget] = ()


class ActiveSequence:
    """A request with a slot. Its prompt's first `num_cached` tokens are in the KV cache."""

    def __init__(
        self, completion: Completion, slot: int, num_cached: int, chunks: Iterable[PrefillChunk]
    ) -> None:
        self.completion, self.slot = completion, slot
        self.prompt = list(completion.request.prompt)
        self.to_prefill = deque(chunks)
        self.cache_length = num_cached  # positions written to, the step in progress included


class ScoringSequence(ActiveSequence):
    """A ScoreRequest in progress."""

    def __init__(
        self, completion: Completion, slot: int, num_cached: int, request: ScoreRequest
    ) -> None:
        chunks = _scoring_chunks(slot, num_cached, request)
        super().__init__(completion, slot, num_cached, chunks)
        self.scores = [0.0] * len(request.continuations)


class GeneratingSequence(ActiveSequence):
    """A Request in progress: prompt, sampled tokens, and the state of sampling."""

    def __init__(
        self,
        completion: Completion,
        slot: int,
        num_cached: int,
        request: Request,
        model: BatchedModel,
        tokenizer: Tokenizer,
    ) -> None:
        all_logits = request.prompt_logprobs is not None
        chunks = _prompt_chunks(slot, num_cached, request.prompt, len(request.prompt), all_logits)
        super().__init__(completion, slot, num_cached, chunks)
        self.request, self.sampling = request, request.sampling
        self.prompt_logprobs: list[TokenLogprob] = []
        self.rng = random.Random(request.seed)
        self.text = TextStream(tokenizer, request.stop)
        self.length = len(self.prompt)
        self.last_token = -1
        self.penalties = (
            Penalties(self.sampling, self.prompt, model.vocab_size, model.device)
            if self.sampling.changes_logits
            else None
        )
        self.constraint = request.constraint

    @property
    def changes_logits(self) -> bool:
        """True when penalties, biases or a constraint apply."""
        return self.penalties is not None or self.constraint is not None

    def adjust_logits(self, logits: Tensor) -> Tensor:
        """Apply penalties, biases and the constraint to the next token's logits [vocab]."""
        if self.penalties is not None:
            logits = self.penalties.apply(logits)
        if self.constraint is not None:
            allowed = self.constraint.allowed()
            allowed = F.pad(allowed, (0, len(logits) - len(allowed)))  # False
            logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)
        return logits


def is_decoding(sequence: ActiveSequence) -> TypeGuard[GeneratingSequence]:
    """Return True when the prompt is prefilled, so that each step generates a token."""
    return isinstance(sequence, GeneratingSequence) and not sequence.to_prefill


def _prompt_chunks(
    slot: int,
    start: int,
    prompt: Sequence[int],
    sequence_length: int,
    all_logits: bool = False,
) -> Iterator[PrefillChunk]:
    """Split a prompt, from token `start` on, into chunks with logits for its last token.

    all_logits: for every token.
    """
    for begin in range(start, len(prompt), CHUNK):
        tokens = prompt[begin : begin + CHUNK]
        num_logits = len(tokens) if all_logits else int(begin + len(tokens) == len(prompt))
        yield PrefillChunk(Part(slot, begin, tokens, sequence_length, num_logits))


def _scoring_chunks(slot: int, start: int, request: ScoreRequest) -> Iterator[PrefillChunk]:
    """Yield the prompt's chunks, then those of each continuation without its last token.

    All continuations use the same positions after the prompt. Continuations that differ in their
    last token alone share their chunks.
    """
    continuations = request.continuations
    *before, last = _prompt_chunks(slot, start, request.prompt, request.input_length)
    yield from before
    first_tokens = [ScoreTarget(0, tokens[0], n) for n, tokens in enumerate(continuations)]
    yield PrefillChunk(last.part, first_tokens)
    by_inputs: dict[tuple[int, ...], list[int]] = {}
    for number, continuation in enumerate(continuations):
        by_inputs.setdefault(tuple(continuation[:-1]), []).append(number)
    for inputs, numbers in by_inputs.items():
        for offset in range(0, len(inputs), CHUNK):
            tokens = inputs[offset : offset + CHUNK]
            position = len(request.prompt) + offset
            yield PrefillChunk(
                Part(slot, position, tokens, request.input_length, len(tokens)),
                [
                    ScoreTarget(row, continuations[number][offset + row + 1], number)
                    for number in numbers
                    for row in range(len(tokens))
                ],
            )
