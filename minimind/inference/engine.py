"""One engine for chat, evaluation and the service: many texts decoded at once.

Requests join and leave at any token (Yu et al. 2022, Orca). Each step reads some chunks of waiting
prompts and writes one token of every running text; a long prompt is read a few chunks a step, so
that running texts do not stall. What a prompt shares with a text that some slot still holds is
copied, not read again, and what it shares with one that is being read just now is waited for.

A request may also have ends of a text weighed, of which nothing is written: exams ask so.
"""

import atexit
import contextlib
import math
import os
import queue
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Literal, Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.errors import ModelError, UsageError
from minimind.inference.batched_model import CHUNK, BatchedModel, Part
from minimind.inference.capacity import MAX_SLOTS, CacheSizer, usable_bytes
from minimind.inference.graphs import GraphedModel
from minimind.inference.load import single_threaded
from minimind.inference.sampling import Penalties, Sampling, choose
from minimind.inference.stop_strings import TextStream
from minimind.model import Transformer
from minimind.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled", "error"]

_READ_BESIDE = 4 * CHUNK  # tokens that a step reads where texts are written, so that they go on
_READ_ALONE = 8 * CHUNK  # and where none is; more are no faster,
_READ_BY_GPU = 32 * CHUNK  # but there
_MASK_SECONDS = 0.002  # so long an idle step waits for a grammar's mask; then others have a turn
_LOGITS = 1 << 24  # numbers that a step makes of what it reads, unless a single chunk needs more
_CLOSE_SECONDS = 10.0  # a step of a large model on a CPU takes that long; a hung device never ends


class Constraint(Protocol):
    """Restricts which tokens an answer may have. Masks are computed in another thread."""

    def wait(self, seconds: float) -> bool:
        """Wait so long for the next mask, and return whether it is there."""

    def allowed(self) -> Tensor:
        """[n] bool, on the CPU; at least one is True. Wait until the mask is computed.

        n: the size of the tokenizer, or the number of the model's rows. Ids from n on are not
        allowed, and ids without a token never are.
        """

    def advance(self, token: int) -> None:
        """Append the token that was chosen, unless it ends the text."""

    @property
    def is_met(self) -> bool:
        """Whether the answer is complete, which ends it."""

    @property
    def is_stuck(self) -> bool:
        """Whether the next mask is there and allows no token, which ends the answer as cut."""


@dataclass(frozen=True)
class Request:
    """A text to go on with. stop: texts, stop_ids: tokens that end it; neither is shown.

    max_new_tokens: None = all the room that the context has. seed: None = another text each time.
    logprobs: log-probabilities of the tokens and of so many others, the likeliest; None = none.
    prompt_logprobs: the same of the prompt, whose first token has none; it is then read whole.
    constraint: serves this request alone.
    """

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True)
class ScoreRequest:
    """Ends that a text may have, to be weighed: nothing is written. Each has a token at the least.

    Where positions are scaled by a text's length, the longest end's counts for all.
    """

    prompt: Sequence[int]
    ends: Sequence[Sequence[int]]

    @property
    def length(self) -> int:
        """Tokens that are read: of an end, all but the last."""
        return len(self.prompt) + max(map(len, self.ends)) - 1


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of what the model itself gave, before temperature and penalties.

    Normalised over every row of the embedding, as transformers and vLLM do. Where the model has
    more rows than the tokenizer has tokens, ids without a token are never chosen nor in `top`, so
    the probabilities of all tokens add up to a little less than 1.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """What a text grew by; the last piece, and it alone, has a finish_reason.

    prompt_logprobs: of all tokens of the prompt but the first, in the first piece that has any.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Generated:
    """A request that has ended. error: why it failed; then the rest is what came before."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    error: Exception | None = None


@dataclass(frozen=True)
class Stats:
    """What an engine does now, and has done so far."""

    running: int
    waiting: int
    free_slots: int
    requests: int
    prompt_tokens: int
    cached_tokens: int
    tokens: int


class Completion:
    """A request on its way: iterate for its pieces, unless they are delivered.

    cached_tokens: how many of the prompt's tokens were not read again. scores: of a Scoring that
    has ended, the natural logarithm of how likely each end is after the prompt, normalised as in
    TokenLogprob. error: why it ended with the finish_reason "error"; iterating raises it.
    """

    def __init__(
        self, request: Request | ScoreRequest, room: int, deliver: Callable[[Piece], None] | None
    ) -> None:
        self.request = request
        self.prompt_tokens = len(request.prompt)
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.scores: list[float] = []
        self.error: Exception | None = None
        self._room = room
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._deliver = self._pieces.put if deliver is None else deliver
        self._cancelled = False

    def __iter__(self) -> Iterator[Piece]:
        while True:
            piece = self._pieces.get()
            if self.error is not None:
                raise self.error
            yield piece
            if piece.finish_reason is not None:
                return

    def cancel(self) -> None:
        """Write no more of it; its last piece says so. Harmless when it has ended."""
        self._cancelled = True

    def _end_with(self, error: BaseException) -> None:
        """Deliver the last piece of a request that ends with an error."""
        self.error = _as_exception(error)
        with contextlib.suppress(Exception):
            self._deliver(Piece("", finish_reason="error"))


@dataclass(frozen=True)
class _Reading:
    """A part of a text that is to be read.

    scored: (which of the logits that are wanted, token, which end of the text it belongs to).
    """

    part: Part
    scored: Sequence[tuple[int, int, int]] = ()


class _Running:
    """A text in a slot, and what of it is still to be read."""

    def __init__(self, completion: Completion, slot: int, readings: Iterable[_Reading]) -> None:
        self.completion, self.slot = completion, slot
        self.prompt = list(completion.request.prompt)
        self.readings = deque(readings)
        self.used = 0  # positions of the slot that it has written to, or is about to


class _Scored(_Running):
    """One whose ends are weighed."""

    def __init__(self, completion: Completion, slot: int, read: int, request: ScoreRequest) -> None:
        super().__init__(completion, slot, _scoring_readings(slot, read, request))
        self.scores = [0.0] * len(request.ends)


class _Writing(_Running):
    """One that is gone on with."""

    def __init__(
        self, completion: Completion, slot: int, read: int, request: Request, engine: "Engine"
    ) -> None:
        length = len(request.prompt)
        scored = request.prompt_logprobs is not None
        readings = _prompt_readings(slot, read, request.prompt, length, scored)
        super().__init__(completion, slot, readings)
        self.request, self.sampling = request, request.sampling
        self.prompt_logprobs: list[TokenLogprob] = []
        self.random = random.Random(request.seed)
        self.text = TextStream(engine.tokenizer, request.stop)
        self.length = len(self.prompt)
        self.last = -1  # the token that was written last
        self.penalties = (
            Penalties(self.sampling, self.prompt, engine.model.vocab_size, engine.model.device)
            if self.sampling.changes_logits
            else None
        )
        self.constraint = request.constraint

    @property
    def changes_logits(self) -> bool:
        return self.penalties is not None or self.constraint is not None

    def adjusted(self, logits: Tensor) -> Tensor:
        """[vocab] what the next token is chosen by."""
        if self.penalties is not None:
            logits = self.penalties.apply(logits)
        if self.constraint is not None:
            allowed = self.constraint.allowed()
            allowed = F.pad(allowed, (0, len(logits) - len(allowed)))  # False
            logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)
        return logits


class Engine:
    """Decodes as many texts at a time as its cache has slots; more requests wait, in their order.

    Closing it, or leaving its `with` block, ends the requests that still run as cancelled.

    An error of one request (scores that are not numbers, its constraint, its receiver) ends that
    request alone. Any other error inside a step stops the engine, for the state of the device and
    the cache is then unknown: `failure` holds the error, and all requests, those that are submitted
    later too, end with the finish_reason "error".
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        slots: int | None = None,
        max_slots: int = MAX_SLOTS,
        context: int | None = None,
        int8: bool = False,
        usable: int | None = None,
    ) -> None:
        """Allocate a KV cache of what is given and, where it is None, of what fits into memory.

        slots: None = up to `max_slots`. context: None = the model's own, as far as memory allows.
        usable: bytes of the cache at most; None = what is free. int8: smaller and less exact
        weights; see BatchedModel. Raises ResourceError, with values that fit, for a cache that
        does not.
        """
        self.tokenizer = tokenizer
        sizer = CacheSizer(model, usable_bytes([model]) if usable is None else usable)
        size = sizer.size(slots, max_slots, context)
        slots, self.context = size.slots, size.context
        self.cache_bytes = sizer.bytes(slots, self.context)
        self._num_threads = torch.get_num_threads()
        with single_threaded():
            self.model = BatchedModel(
                model, slots, self.context, int8=int8, threads=self._num_threads
            )
        self._steps = GraphedModel(self.model)
        self._num_ids = min(tokenizer.vocab_size, self.model.vocab_size)
        self._without_token = self._ids_without_token()
        self._free = list(range(slots))  # the longest unused first
        self._held: list[list[int]] = [[] for _ in range(slots)]  # whole chunks, by slot
        self._waiting: deque[Completion] = deque()
        self._running: list[_Running] = []
        self._changed = _TURNS.changed
        self._closed = False
        self._failure: Exception | None = None
        self._ended = threading.Event()
        self._counts = dict(requests=0, prompt_tokens=0, cached_tokens=0, tokens=0)
        _TURNS.join(self)
        atexit.register(self.close)  # a thread amid torch's code would abort the process

    def _ids_without_token(self) -> Tensor | None:
        """[rows of the embedding] bool: ids that must not be chosen; None where there are none."""
        without = torch.ones(self.model.vocab_size, dtype=torch.bool)
        without[[token for token in self.tokenizer.token_ids if token < self._num_ids]] = False
        return without.to(self.model.device) if without.any() else None

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(
        self, request: Request | ScoreRequest, deliver: Callable[[Piece], None] | None = None
    ) -> Completion:
        """Put a request in line, from any thread.

        deliver is called with each piece in the thread that decodes, where it must not block;
        without it, iterate over the completion. Of a Scoring there is one piece, which says that
        its scores are there. Raises UsageError, at once, when the prompt is empty or does not fit
        into the context. Of an engine that has stopped with an error the request ends with that
        error.
        """
        room = self.context - len(request.prompt)
        if isinstance(request, ScoreRequest):
            self._check_scoring(request)
        else:
            self._check(request)
            if request.max_new_tokens is not None:
                room = min(room, request.max_new_tokens)
        completion = Completion(request, room, deliver)
        with self._changed:
            assert not self._closed, "the engine is closed"
            self._counts["requests"] += 1
            failure = self._failure
            if failure is None:
                self._waiting.append(completion)
                self._changed.notify()
        if failure is not None:
            completion._end_with(failure)
        return completion

    @property
    def failure(self) -> Exception | None:
        """The error that stopped the engine; None while it works."""
        return self._failure

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Generated]]:
        """Run requests together and yield (index, outcome) of each as it ends.

        A request that is refused or fails does so alone. Leaving the loop cancels the rest.
        """
        pieces: list[list[Piece]] = [[] for _ in requests]
        completions: dict[int, Completion] = {}
        ended: queue.SimpleQueue[int] = queue.SimpleQueue()

        def take(index: int, piece: Piece) -> None:
            """Collect in the engine's thread: waking another one per token costs far more."""
            pieces[index].append(piece)
            if piece.finish_reason is not None:
                ended.put(index)

        try:
            for index, request in enumerate(requests):
                try:
                    completions[index] = self.submit(request, partial(take, index))
                except UsageError as error:
                    yield index, Generated("", (), (), "error", error)
            for _ in range(len(completions)):
                index = ended.get()
                last = pieces[index][-1].finish_reason
                assert last is not None
                yield (
                    index,
                    Generated(
                        "".join(piece.text for piece in pieces[index]),
                        tuple(token for piece in pieces[index] for token in piece.token_ids),
                        tuple(entry for piece in pieces[index] for entry in piece.logprobs),
                        last,
                        completions[index].error,
                    ),
                )
        finally:
            for completion in completions.values():
                completion.cancel()

    def stream_text(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int | None = None,
    ) -> Generator[str]:
        """What the model writes after `prompt` as it comes, to the end of a message or document.

        Raises UsageError, at once, when the prompt does not fit into the context. Closing the
        generator ends the request.
        """
        completion = self.submit(
            Request(
                prompt,
                sampling,
                max_new_tokens,
                stop_ids=frozenset(self.tokenizer.stop_ids),
                seed=seed,
            )
        )

        def texts() -> Generator[str]:
            try:
                yield from (piece.text for piece in completion)
            finally:
                completion.cancel()

        return texts()

    def _check(self, request: Request) -> None:
        if not request.prompt:
            raise UsageError("the prompt is empty")
        if len(request.prompt) >= self.context:
            raise UsageError(
                f"the prompt has {len(request.prompt):,} tokens and the model's context is "
                f"{self.context:,}; shorten it"
            )
        self._check_tokens("prompt", request.prompt)
        self._check_tokens("logit_bias", request.sampling.logit_bias)
        if request.max_new_tokens is not None and request.max_new_tokens < 0:
            raise UsageError(f"max_new_tokens is {request.max_new_tokens}; it must be 0 or more")

    def _check_scoring(self, request: ScoreRequest) -> None:
        assert request.prompt and request.ends and all(request.ends), "nothing to weigh"
        if request.length > self.context:
            raise UsageError(
                f"the text has {request.length:,} tokens before its last and the model's context "
                f"is {self.context:,}; shorten it"
            )
        for what, ids in (("prompt", request.prompt), *(("end", end) for end in request.ends)):
            self._check_tokens(what, ids)

    def _check_tokens(self, what: str, ids: Iterable[int]) -> None:
        if not all(0 <= token < self._num_ids for token in ids):
            raise UsageError(f"{what}: token ids go from 0 to {self._num_ids - 1:,} in this model")

    def stats(self) -> Stats:
        """A look from any thread."""
        with self._changed:
            return Stats(
                running=len(self._running),
                waiting=len(self._waiting),
                free_slots=len(self._free),
                **self._counts,
            )

    def close(self, seconds: float = _CLOSE_SECONDS) -> None:
        """End all requests; return after `seconds` even where a step never ends."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not _TURNS.thread:
            if not self._ended.wait(seconds):
                self._stop(TimeoutError(f"the step at hand has not ended within {seconds:g} s"))
            atexit.unregister(self.close)

    # All below runs in the thread that decodes.

    def has_work(self) -> bool:
        """Whether a turn would do anything."""
        return bool(self._running or self._waiting or self._closed)

    def turn(self) -> bool:
        """Let requests go and come, and one step; False when the engine is closed or has failed."""
        try:
            torch.set_num_threads(self._num_threads)  # of this thread
            if self._take_in():
                self._step()
                return True
        except BaseException as error:  # a panic in Rust is not an Exception
            self._stop(error)
        self._ended.set()
        return False

    def _stop(self, error: BaseException) -> None:
        """End every request with an error. Leaves the device alone: any call may fail there."""
        failure = _as_exception(error)
        with self._changed:
            self._failure = failure
            ended = [*(running.completion for running in self._running), *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for completion in ended:
            completion._end_with(failure)

    def _take_in(self) -> bool:
        """Let requests go and come; False to end."""
        with self._changed:
            gone = [c for c in self._waiting if c._cancelled or self._closed]
            for completion in gone:
                self._waiting.remove(completion)
            closed = self._closed
        for completion in gone:
            self._tell(completion, Piece("", finish_reason="cancelled"))
        for running in list(self._running):
            if running.completion._cancelled or closed:
                with self._own_fault(running):
                    self._finish(running, "cancelled")
        with self._changed:  # more of them may wait by now, and have their turn too
            first = list(islice(self._waiting, len(self._held)))
        for completion in first:
            if not self._free:
                break
            self._start(completion)
        return not closed

    def _start(self, completion: Completion) -> None:
        """Find a slot, and what of the prompt needs no reading; not yet where that grows."""
        request = completion.request
        prompt = request.prompt
        length = request.length if isinstance(request, ScoreRequest) else len(prompt)
        scored = isinstance(request, Request) and request.prompt_logprobs is not None
        alike = self.model.reads_alike(length) and not scored
        shared = [_shared_chunks(held, prompt) if alike else 0 for held in self._held]
        source = max(range(len(shared)), key=lambda slot: (shared[slot], slot in self._free))
        read = shared[source]
        coming = [self._coming(other) if alike else () for other in self._running]
        if any(_shared_chunks(other, prompt) > read for other in coming):
            return
        slot = source if read and source in self._free else self._free[0]
        try:
            running = (
                _Scored(completion, slot, read, request)
                if isinstance(request, ScoreRequest)
                else _Writing(completion, slot, read, request, self)
            )
        except torch.AcceleratorError:
            raise
        except BaseException as error:  # its own, such as a panic in the tokenizer
            with self._changed:
                self._waiting.remove(completion)
            completion._end_with(error)
            return
        running.used = read
        if slot != source and read:
            self.model.copy_prefix(source, slot, read)
        self._held[slot] = list(prompt[:read])
        completion.cached_tokens = read
        with self._changed:
            self._waiting.remove(completion)
            self._free.remove(slot)
            self._running.append(running)
            self._counts["prompt_tokens"] += len(prompt)
            self._counts["cached_tokens"] += read

    def _coming(self, running: "_Running") -> Sequence[int]:
        """What the slot of a text will hold when its prompt is read."""
        if not running.readings:
            return ()
        shares = self.model.reads_alike(running.readings[0].part.text_length)
        return running.prompt if shares else ()

    def _step(self) -> None:
        texts = self._unblocked(sorted((r for r in self._running if _is_written(r)), key=_slot))
        singles = [Part(text.slot, text.length - 1, (text.last,)) for text in texts]
        for text in texts:
            text.used = text.length
        chunks = self._next_chunks()
        if not (singles or chunks):
            return
        logits = self._steps.forward(singles, [reading.part for _, reading in chunks])
        rows = list(range(len(texts)))
        scored: list[tuple[_Scored, int, int, int]] = []
        row = len(texts)
        for running, reading in chunks:
            if running not in self._running:  # its part before this one had no valid scores
                row += reading.part.wanted
                continue
            self._hold(running, reading.part)
            if isinstance(running, _Scored):
                scored += [(running, row + at, token, n) for at, token, n in reading.scored]
            elif isinstance(running, _Writing) and reading.part.wanted:
                if running.request.prompt_logprobs is not None:
                    self._score_prompt(running, reading.part, logits[row:])
                is_last = reading.part.start + len(reading.part.tokens) == running.length
                if is_last and running.completion._room == 0:
                    self._finish(running, "length")
                elif is_last and running in self._running:
                    rows.append(row + reading.part.wanted - 1)
                    texts.append(running)
            row += reading.part.wanted
        if scored:
            self._weigh(scored, logits)
        if rows:
            self._write(texts, logits if len(rows) == len(logits) else logits[rows])

    def _unblocked(self, texts: "Sequence[_Writing]") -> "list[_Writing]":
        """The texts that need not wait for a mask: those that do sit out this step."""
        constraints = [text.constraint for text in texts if text.constraint is not None]
        if len(constraints) == len(self._running):  # and there is nothing else to do
            any(constraint.wait(_MASK_SECONDS) for constraint in constraints)
        ready = [text for text in texts if text.constraint is None or text.constraint.wait(0)]
        for text in ready:
            if text.constraint is not None and text.constraint.is_stuck:
                self._finish(text, "length")
        return [text for text in ready if text in self._running]

    def _next_chunks(self) -> list[tuple["_Running", _Reading]]:
        """What is read of which text in this step, first come first."""
        chunks: list[tuple[_Running, _Reading]] = []
        most = _READ_ALONE if self.model.device.type == "cpu" else _READ_BY_GPU
        if any(map(_is_written, self._running)):
            most = _READ_BESIDE
        tokens = numbers = 0
        for running in self._running:
            end = 0
            # Another end of a text takes the place of the one before it: in another step.
            while running.readings and (part := running.readings[0].part).start >= end:
                end = part.start + len(part.tokens)
                tokens += len(part.tokens)
                numbers += part.wanted * self.model.vocab_size
                if chunks and (tokens > most or numbers > _LOGITS):
                    return chunks
                chunks.append((running, running.readings.popleft()))
                running.used = max(running.used, end)
        return chunks

    def _hold(self, running: "_Running", part: Part) -> None:
        """Remember what was read where it is a whole chunk of a prompt that others may share."""
        whole = len(part.tokens) == CHUNK and part.start + CHUNK <= len(running.prompt)
        if whole and self.model.reads_alike(part.text_length):
            self._held[running.slot] += part.tokens

    def _weigh(self, scored: Sequence[tuple["_Scored", int, int, int]], logits: Tensor) -> None:
        """Add what tokens come to: (text, row of the logits, token, which end) each."""
        where = torch.tensor([entry[1:3] for entry in scored], device=logits.device)
        found = logits.log_softmax(-1)[where[:, 0], where[:, 1]].tolist()
        for (text, _, _, end), score in zip(scored, found, strict=True):
            text.scores[end] += score
        for text in dict.fromkeys(entry[0] for entry in scored):
            if not all(map(math.isfinite, text.scores)):
                self._fail(text, ModelError(NON_FINITE))
            elif not text.readings:
                text.completion.scores = text.scores
                self._finish(text, "stop")

    def _score_prompt(self, text: "_Writing", part: Part, logits: Tensor) -> None:
        """Log-probabilities of the prompt's tokens after each of the part's: logits of these."""
        following = text.prompt[part.start + 1 : part.start + 1 + part.wanted]
        number = text.request.prompt_logprobs or 0
        scores = logits[: len(following)].log_softmax(-1)
        tokens = torch.tensor(following, dtype=torch.int64, device=scores.device)
        text.prompt_logprobs += self._token_logprobs(scores, tokens, [number] * len(following))
        if not all(math.isfinite(token.logprob) for token in text.prompt_logprobs):
            self._fail(text, ModelError(NON_FINITE))
        elif part.start + len(part.tokens) == text.length:
            self._show(text, Piece("", prompt_logprobs=tuple(text.prompt_logprobs)))

    def _write(self, texts: Sequence["_Writing"], logits: Tensor) -> None:
        """Choose the next token of each text: logits [texts, vocab]."""
        choices = self._choices(logits)
        adjusted = list(choices.unbind())
        for row, text in enumerate(texts):
            if text.changes_logits:
                with self._own_fault(text):
                    adjusted[row] = text.adjusted(choices[row])
        changed = any(text.changes_logits for text in texts)
        samplings = [text.sampling for text in texts]
        numbers = [0.0 if text.sampling.greedy else text.random.random() for text in texts]
        tokens = choose(torch.stack(adjusted) if changed else choices, samplings, numbers)
        # One transfer from the device; a sum is a number where all that was added is. Token ids are
        # far below 2**24, up to where single precision holds them; Apple's MPS has no other.
        chosen, sums = torch.stack((tokens.float(), logits.sum(-1))).tolist()
        logprobs = self._logprobs(texts, logits, tokens)
        for row, text in enumerate(texts):
            if text.completion.error is not None:  # it has failed above
                continue
            with self._own_fault(text):
                if not math.isfinite(sums[row]):
                    raise ModelError(NON_FINITE)
                self._go_on(text, int(chosen[row]), logprobs.get(row))

    @contextlib.contextmanager
    def _own_fault(self, running: "_Running") -> Iterator[None]:
        """End a request alone with what is raised here, unless the device is at fault."""
        try:
            yield
        except torch.AcceleratorError:
            raise
        except BaseException as error:  # a panic in Rust is not an Exception
            self._fail(running, error)

    def _choices(self, scores: Tensor) -> Tensor:
        """`scores` [..., vocab] with -inf for the ids that have no token.

        The one place where they are masked: whatever chooses or lists tokens goes through here.
        """
        if self._without_token is None:
            return scores
        return scores.masked_fill(self._without_token, -torch.inf)

    def _token_logprobs(
        self, scores: Tensor, tokens: Tensor, numbers: Sequence[int]
    ) -> Iterator[TokenLogprob]:
        """Log-probabilities of a token for each row of scores, and of so many most likely ones."""
        own = scores.gather(-1, tokens[:, None])[:, 0].tolist()
        number = min(max(numbers, default=0), len(self.tokenizer.token_ids), scores.shape[-1])
        top = self._choices(scores).topk(number)
        values, ids = top.values.tolist(), top.indices.tolist()
        for row, token in enumerate(tokens.tolist()):
            most_likely = zip(ids[row], values[row], strict=True)
            yield TokenLogprob(token, own[row], tuple(most_likely)[: numbers[row]])

    def _logprobs(
        self, texts: Sequence["_Writing"], logits: Tensor, tokens: Tensor
    ) -> dict[int, TokenLogprob]:
        wanted = [text.request.logprobs for text in texts]
        rows = [row for row, number in enumerate(wanted) if number is not None]
        asked = [number for number in wanted if number is not None]
        if not rows:
            return {}
        found = self._token_logprobs(logits[rows].log_softmax(-1), tokens[rows], asked)
        return dict(zip(rows, found, strict=True))

    def _go_on(self, text: "_Writing", token: int, logprob: TokenLogprob | None) -> None:
        completion = text.completion
        if token in text.request.stop_ids:
            self._finish(text, "stop")
            return
        completion.completion_tokens += 1
        self._counts["tokens"] += 1
        text.last = token
        text.length += 1
        if text.penalties is not None:
            text.penalties.wrote(token)
        if text.constraint is not None:
            text.constraint.advance(token)
        text.text.push(token, logprob)
        if text.text.stopped or (text.constraint is not None and text.constraint.is_met):
            self._finish(text, "stop")
        elif completion.completion_tokens >= completion._room:
            self._finish(text, "length")
        elif shown := text.text.take():
            self._show(text, Piece(*shown))

    def _show(self, text: "_Writing", piece: Piece) -> None:
        if not self._tell(text.completion, piece):
            text.completion._cancelled = True

    def _finish(self, text: "_Running", reason: FinishReason) -> None:
        shown = text.text.finish() if isinstance(text, _Writing) else ("", (), ())
        self._leave(text)
        self._tell(text.completion, Piece(*shown, finish_reason=reason))

    def _fail(self, text: "_Running", error: BaseException) -> None:
        if text not in self._running:
            return
        self.model.wipe(text.slot, text.used)  # first: where the device fails, all requests do
        self._leave(text)
        self._held[text.slot] = []
        text.completion._end_with(error)

    def _leave(self, text: "_Running") -> None:
        with self._changed:
            self._running.remove(text)
            self._free.append(text.slot)

    def _tell(self, completion: Completion, piece: Piece) -> bool:
        """Whether the piece was taken: a receiver that raises ends its own request alone."""
        try:
            completion._deliver(piece)
        except Exception as error:
            completion.error = error
            return False
        return True


class _Turns:
    """The thread that decodes, one for all engines of a process: they take turns, a step each.

    Each thread that calls torch has helpers of its own, and two sets of them on the same cores
    get in each other's way; see `on_one_core`.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.thread: threading.Thread | None = None  # while there are engines
        self._engines: list[Engine] = []

    def join(self, engine: Engine) -> None:
        """Let an engine take turns from now on, until it is closed."""
        with self.changed:
            self._engines.append(engine)
            if self.thread is None:
                self.thread = threading.Thread(
                    target=self._work, name="minimind-engine", daemon=True
                )
                self.thread.start()

    @torch.inference_mode()
    def _work(self) -> None:
        while ready := self._ready():
            closed = [engine for engine in ready if not engine.turn()]
            with self.changed:
                self._engines = [engine for engine in self._engines if engine not in closed]

    def _ready(self) -> list[Engine]:
        """Wait for engines that have work; none when there are none left."""
        with self.changed:
            while not (ready := [engine for engine in self._engines if engine.has_work()]):
                if not self._engines:
                    self.thread = None
                    break
                self.changed.wait()
            return ready


_TURNS = _Turns()


def describe(error: BaseException) -> str:
    """The kind of an error and the first line of its message, on one line."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])[:300]


def _as_exception(error: BaseException) -> Exception:
    """The error itself, or what stands for one that is no Exception, such as a panic in Rust."""
    return error if isinstance(error, Exception) else RuntimeError(describe(error))


def lower_thread_priority() -> None:
    """Let other threads, which take less, go before the one that decodes; where there is Linux.

    To be called once there is an engine and before it decodes: what helps a thread is as nice as
    the thread was when it was first helped.
    """
    if sys.platform == "linux" and _TURNS.thread is not None and _TURNS.thread.native_id:
        os.setpriority(os.PRIO_PROCESS, _TURNS.thread.native_id, _NICENESS)


_NICENESS = 5  # benchmarks/records/service-reliability.md has what it brings

NON_FINITE = (
    "the model gives scores that are not numbers: its weights are damaged, or its "
    "training went wrong. Take another checkpoint, or copy the model again"
)


def _slot(running: _Running) -> int:
    return running.slot


def _is_written(running: _Running) -> TypeGuard[_Writing]:
    """Whether its prompt is read, and a token of it is written in each step."""
    return isinstance(running, _Writing) and not running.readings


def _prompt_readings(
    slot: int, read: int, prompt: Sequence[int], text_length: int, scored: bool = False
) -> Iterator[_Reading]:
    """A prompt in chunks, from the token `read` on; logits are wanted after its last.

    scored: and after all others.
    """
    for start in range(read, len(prompt), CHUNK):
        tokens = prompt[start : start + CHUNK]
        wanted = len(tokens) if scored else int(start + len(tokens) == len(prompt))
        yield _Reading(Part(slot, start, tokens, text_length, wanted))


def _scoring_readings(slot: int, read: int, request: ScoreRequest) -> Iterator[_Reading]:
    """The prompt, then each end without its last token, all in the same places behind it."""
    *before, last = _prompt_readings(slot, read, request.prompt, request.length)
    yield from before
    yield _Reading(last.part, [(0, end[0], number) for number, end in enumerate(request.ends)])
    by_beginning: dict[tuple[int, ...], list[int]] = {}  # letters may differ in the last alone
    for number, end in enumerate(request.ends):
        by_beginning.setdefault(tuple(end[:-1]), []).append(number)
    for tokens, numbers in by_beginning.items():
        for at in range(0, len(tokens), CHUNK):
            chunk = tokens[at : at + CHUNK]
            place = len(request.prompt) + at
            yield _Reading(
                Part(slot, place, chunk, request.length, len(chunk)),
                [
                    (row, request.ends[number][at + row + 1], number)
                    for number in numbers
                    for row in range(len(chunk))
                ],
            )


def _shared_chunks(held: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens of the prompt a slot holds, in whole chunks; one at least is left to read."""
    most = min(len(held), (len(prompt) - 1) // CHUNK * CHUNK)
    shared = 0
    while shared < most and list(prompt[shared : shared + CHUNK]) == held[shared : shared + CHUNK]:
        shared += CHUNK
    return shared
