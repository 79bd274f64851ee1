"""The decoding engine behind chat, evaluation and the service: continuous batching.

Each step admits waiting requests (`scheduler.py`), prefills chunks of prompts, decodes one token of
every other active sequence, and delivers new text. A request may instead ask for the
log-likelihoods of continuations, which evaluation uses.
"""

import atexit
import contextlib
import math
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from minimind.errors import ModelError, UsageError
from minimind.inference.batched_model import BatchedModel, Part
from minimind.inference.capacity import MAX_SLOTS, CacheSizer, usable_bytes
from minimind.inference.engine_thread import ENGINE_THREAD
from minimind.inference.failures import NON_FINITE, as_exception
from minimind.inference.graphs import GraphedModel
from minimind.inference.load import single_threaded
from minimind.inference.requests import (
    Completion,
    EngineStats,
    FinishReason,
    GenerationResult,
    Piece,
    Request,
    ScoreRequest,
    TokenLogprob,
)
from minimind.inference.sampling import Sampling, sample
from minimind.inference.scheduler import Scheduler
from minimind.inference.sequences import (
    ActiveSequence,
    GeneratingSequence,
    ScoreTarget,
    ScoringSequence,
    is_decoding,
)
from minimind.inference.vocabulary import ModelVocabulary
from minimind.model import Transformer
from minimind.tokenizer import Tokenizer

_MASK_WAIT_SECONDS = 0.002  # longest wait for a grammar mask while nothing else can run
_CLOSE_SECONDS = 10.0  # a CPU step of a large model takes that long; a hung device never returns


class Engine:
    """Runs requests in batches of up to `slots` sequences; further requests wait in line.

    Closing the engine, or leaving its `with` block, cancels unfinished requests.

    An error of one request (logits that are not finite, its constraint, its receiver) ends that
    request alone. Any other error inside a step stops the engine, because the state of the device
    and of the cache is then unknown: `failure` holds the error, and all requests, later ones
    included, end with the finish_reason "error".
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
        """Allocate the KV cache; sizes that are None are chosen to fit into memory.

        slots: sequences in a batch; None = up to `max_slots`.
        context: tokens per sequence; None = the model's context, or less if memory is short.
        usable: bytes that the cache may take; None = what is free.
        int8: quantize the weights; see BatchedModel.

        Raises ResourceError, with values that fit, when the cache does not fit.
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
        self._graphed_model = GraphedModel(self.model)
        self._vocabulary = ModelVocabulary(tokenizer, self.model.vocab_size, self.model.device)
        self._changed = ENGINE_THREAD.changed
        self._scheduler = Scheduler(self.model, tokenizer, self._changed)
        self._closed = False
        self._failure: Exception | None = None
        self._ended = threading.Event()
        ENGINE_THREAD.add(self)
        atexit.register(self.close)  # exiting inside a torch call would abort the process

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(
        self, request: Request | ScoreRequest, deliver: Callable[[Piece], None] | None = None
    ) -> Completion:
        """Queue a request; may be called from any thread.

        deliver: called with each piece in the engine's thread, where it must not block. Without
        it, iterate over the completion. A ScoreRequest has a single piece, delivered when its
        scores are there.

        Raises UsageError when the request is invalid or does not fit into the context, or the
        engine is closed. After an engine failure the request ends with that error.
        """
        request.check(self.context)
        max_new_tokens = self.context - len(request.prompt)
        self._vocabulary.check("prompt", request.prompt)
        if isinstance(request, ScoreRequest):
            for continuation in request.continuations:
                self._vocabulary.check("continuation", continuation)
        else:
            self._vocabulary.check("logit_bias", request.sampling.logit_bias)
            if request.max_new_tokens is not None:
                max_new_tokens = min(max_new_tokens, request.max_new_tokens)
        completion = Completion(request, max_new_tokens, deliver)
        with self._changed:
            if self._closed:
                raise UsageError("the model is closed; load it again")
            failure = self._failure
            if failure is None:
                self._scheduler.waiting.append(completion)
                self._changed.notify()
        if failure is not None:
            completion.fail(failure)
        return completion

    @property
    def failure(self) -> Exception | None:
        """The error that stopped the engine, if any."""
        return self._failure

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, GenerationResult]]:
        """Run requests together and yield (index, result) in the order in which they finish.

        A request that is invalid or fails does not affect the others. Closing the iterator cancels
        unfinished requests.
        """
        pieces: list[list[Piece]] = [[] for _ in requests]
        completions: dict[int, Completion] = {}
        finished: queue.SimpleQueue[int] = queue.SimpleQueue()

        def collect(index: int, piece: Piece) -> None:
            """Collect in the engine's thread: waking another thread per token costs far more."""
            pieces[index].append(piece)
            if piece.finish_reason is not None:
                finished.put(index)

        try:
            for index, request in enumerate(requests):
                try:
                    completions[index] = self.submit(request, partial(collect, index))
                except UsageError as error:
                    yield index, GenerationResult("", (), (), "error", error)
            for _ in range(len(completions)):
                index = finished.get()
                yield index, GenerationResult.join(pieces[index], completions[index].error)
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
        """Generate a continuation of `prompt` as a stream of text, up to a stop token.

        Raises UsageError immediately when the prompt does not fit into the context. Closing the
        generator cancels the request.
        """
        stop_ids = frozenset(self.tokenizer.stop_ids)
        request = Request(prompt, sampling, max_new_tokens, stop_ids=stop_ids, seed=seed)
        completion = self.submit(request)

        def texts() -> Generator[str]:
            try:
                yield ""  # consumed below: closing a generator that has not begun runs no `finally`
                yield from (piece.text for piece in completion)
            finally:
                completion.cancel()

        stream = texts()
        next(stream)
        return stream

    def stats(self) -> EngineStats:
        """Return a snapshot; may be called from any thread."""
        with self._changed:
            return EngineStats(len(self._scheduler.active), len(self._scheduler.waiting))

    def close(self, seconds: float = _CLOSE_SECONDS) -> None:
        """End all requests; return after `seconds` even when the current step hangs."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not ENGINE_THREAD.thread:
            if not self._ended.wait(seconds):
                self._stop(TimeoutError(f"the current step did not end within {seconds:g} s"))
            atexit.unregister(self.close)

    # Everything below runs in the engine's thread.

    def has_work(self) -> bool:
        """Return True when a step would do anything."""
        return bool(self._scheduler.active or self._scheduler.waiting or self._closed)

    def step(self) -> bool:
        """Schedule, prefill and decode; return False when the engine is closed or has failed."""
        try:
            torch.set_num_threads(self._num_threads)  # a setting per thread
            if self._schedule():
                self._run_model()
                return True
        except BaseException as error:  # a panic in Rust is not an Exception
            self._stop(error)
        self._ended.set()
        return False

    def _stop(self, error: BaseException) -> None:
        """End every request with an error. Does not touch the device: any call may fail there."""
        failure = as_exception(error)
        with self._changed:
            self._failure = failure
            unfinished = self._scheduler.remove_all()
        for completion in unfinished:
            completion.fail(failure)

    def _schedule(self) -> bool:
        """Remove cancelled requests and admit waiting ones; return False when closed."""
        with self._changed:
            closed = self._closed
            dropped = self._scheduler.drop_waiting(everything=closed)
        for completion in dropped:
            completion.deliver(Piece("", finish_reason="cancelled"))
        for sequence in list(self._scheduler.active):
            if sequence.completion.is_cancelled or closed:
                with self._isolate_errors(sequence):
                    self._finish(sequence, "cancelled")
        self._scheduler.admit()
        return not closed

    def _run_model(self) -> None:
        """Run one forward pass; sample the next token of each sequence whose prompt is complete."""
        sequences = self._ready_to_decode()
        decode = [Part(s.slot, s.length - 1, (s.last_token,)) for s in sequences]
        for sequence in sequences:
            sequence.cache_length = sequence.length
        prefill = self._scheduler.next_prefill()
        if not (decode or prefill):
            return
        logits = self._graphed_model.forward(decode, [chunk.part for _, chunk in prefill])
        rows = list(range(len(sequences)))  # of the logits that a token is sampled from
        targets: list[tuple[ScoringSequence, ScoreTarget]] = []
        end = len(rows)
        for active, chunk in prefill:
            start, end = end, end + chunk.part.logits_for_last
            if active not in self._scheduler.active:  # an earlier chunk in this step failed
                continue
            self._scheduler.cache_prefix(active, chunk.part)
            if isinstance(active, ScoringSequence):
                targets += [
                    (active, target._replace(logit_row=start + target.logit_row))
                    for target in chunk.targets
                ]
            elif isinstance(active, GeneratingSequence) and self._finish_prefill(
                active, chunk.part, logits[start:end]
            ):
                rows.append(end - 1)
                sequences.append(active)
        if targets:
            self._score(targets, logits)
        if rows:
            self._sample(sequences, logits if len(rows) == len(logits) else logits[rows])

    def _ready_to_decode(self) -> list[GeneratingSequence]:
        """Return the sequences to decode, by slot; those without a grammar mask skip this step."""
        active = self._scheduler.active
        sequences = sorted(filter(is_decoding, active), key=lambda sequence: sequence.slot)
        constraints = [s.constraint for s in sequences if s.constraint is not None]
        if len(constraints) == len(active):  # there is nothing else to do
            any(constraint.wait(_MASK_WAIT_SECONDS) for constraint in constraints)
        ready = [s for s in sequences if s.constraint is None or s.constraint.wait(0)]
        for sequence in ready:
            if sequence.constraint is not None and sequence.constraint.is_stuck:
                self._finish(sequence, "length")
        return [sequence for sequence in ready if sequence in active]

    def _finish_prefill(self, sequence: GeneratingSequence, part: Part, logits: Tensor) -> bool:
        """Process a prefilled part; return True when the next token is to be sampled.

        logits: [part.logits_for_last, vocab].
        """
        if not part.logits_for_last:
            return False
        if sequence.request.prompt_logprobs is not None and not self._add_prompt_logprobs(
            sequence, part, logits
        ):
            return False
        is_complete = part.start + len(part.tokens) == sequence.length
        if is_complete and sequence.completion.max_new_tokens == 0:
            self._finish(sequence, "length")
            return False
        return is_complete

    def _add_prompt_logprobs(
        self, sequence: GeneratingSequence, part: Part, logits: Tensor
    ) -> bool:
        """Score the prompt tokens that follow those of a part; return False on failure."""
        following = sequence.prompt[part.start + 1 : part.start + 1 + part.logits_for_last]
        top_counts = [sequence.request.prompt_logprobs or 0] * len(following)
        logprobs = logits[: len(following)].log_softmax(-1)
        tokens = torch.tensor(following, dtype=torch.int64, device=logprobs.device)
        sequence.prompt_logprobs += self._vocabulary.token_logprobs(logprobs, tokens, top_counts)
        if not all(math.isfinite(entry.logprob) for entry in sequence.prompt_logprobs):
            self._fail(sequence, ModelError(NON_FINITE))
            return False
        if part.start + len(part.tokens) == sequence.length:
            self._deliver(sequence, Piece("", prompt_logprobs=tuple(sequence.prompt_logprobs)))
        return True

    def _score(
        self, targets: Sequence[tuple[ScoringSequence, ScoreTarget]], logits: Tensor
    ) -> None:
        """Add the log-likelihoods of targets to the scores of their continuations.

        logits: [rows, vocab]; `logit_row` of a target is one of its rows.
        """
        index = torch.tensor([(t.logit_row, t.token) for _, t in targets], device=logits.device)
        logprobs = logits.log_softmax(-1)[index[:, 0], index[:, 1]].tolist()
        for (sequence, target), logprob in zip(targets, logprobs, strict=True):
            sequence.scores[target.continuation] += logprob
        for sequence in dict.fromkeys(sequence for sequence, _ in targets):
            if not all(map(math.isfinite, sequence.scores)):
                self._fail(sequence, ModelError(NON_FINITE))
            elif not sequence.to_prefill:
                sequence.completion.scores = sequence.scores
                self._finish(sequence, "stop")

    def _sample(self, sequences: Sequence[GeneratingSequence], logits: Tensor) -> None:
        """Sample and append the next token of each sequence; logits: [sequences, vocab]."""
        allowed = self._vocabulary.mask(logits)
        adjusted = list(allowed.unbind())
        for row, sequence in enumerate(sequences):
            if sequence.changes_logits:
                with self._isolate_errors(sequence):
                    adjusted[row] = sequence.adjust_logits(allowed[row])
        changed = any(sequence.changes_logits for sequence in sequences)
        samplings = [sequence.sampling for sequence in sequences]
        uniform = [0.0 if s.sampling.greedy else s.rng.random() for s in sequences]
        tokens = sample(torch.stack(adjusted) if changed else allowed, samplings, uniform)
        # One transfer from the device. A row's sum is finite only if every logit is (none is
        # masked here). Token ids are below 2**24 and thus exact in float32; MPS has no float64.
        token_ids, sums = torch.stack((tokens.float(), logits.sum(-1))).tolist()
        top_counts = [sequence.request.logprobs for sequence in sequences]
        logprobs = self._vocabulary.sampled_logprobs(logits, tokens, top_counts)
        for row, sequence in enumerate(sequences):
            if sequence.completion.error is not None:  # it failed above
                continue
            with self._isolate_errors(sequence):
                if not math.isfinite(sums[row]):
                    raise ModelError(NON_FINITE)
                self._append_token(sequence, int(token_ids[row]), logprobs.get(row))

    def _append_token(
        self, sequence: GeneratingSequence, token: int, logprob: TokenLogprob | None
    ) -> None:
        """Append a sampled token; deliver new text, or finish the sequence."""
        completion = sequence.completion
        if token in sequence.request.stop_ids:
            self._finish(sequence, "stop")
            return
        completion.completion_tokens += 1
        sequence.last_token = token
        sequence.length += 1
        if sequence.penalties is not None:
            sequence.penalties.add(token)
        if sequence.constraint is not None:
            sequence.constraint.advance(token)
        sequence.text.push(token, logprob)
        if sequence.text.stopped or (
            sequence.constraint is not None and sequence.constraint.is_met
        ):
            self._finish(sequence, "stop")
        elif completion.completion_tokens >= completion.max_new_tokens:
            self._finish(sequence, "length")
        elif ready := sequence.text.take():
            self._deliver(sequence, Piece(*ready))

    @contextlib.contextmanager
    def _isolate_errors(self, sequence: ActiveSequence) -> Iterator[None]:
        """Fail a single request with an error raised inside, unless it is a device error."""
        try:
            yield
        except torch.AcceleratorError:
            raise
        except BaseException as error:  # a panic in Rust is not an Exception
            self._fail(sequence, error)

    def _deliver(self, sequence: GeneratingSequence, piece: Piece) -> None:
        """Deliver a piece; a receiver that raises cancels its request."""
        if not sequence.completion.deliver(piece):
            sequence.completion.cancel()

    def _finish(self, sequence: ActiveSequence, reason: FinishReason) -> None:
        """Free the slot and deliver the last piece."""
        rest = sequence.text.finish() if isinstance(sequence, GeneratingSequence) else ("", (), ())
        self._scheduler.release(sequence)
        sequence.completion.deliver(Piece(*rest, finish_reason=reason))

    def _fail(self, sequence: ActiveSequence, error: BaseException) -> None:
        """Free the slot and end the request with an error."""
        if sequence in self._scheduler.active:
            self._scheduler.release_damaged(sequence)
            sequence.completion.fail(error)
