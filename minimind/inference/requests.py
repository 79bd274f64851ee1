"""Requests to the engine and their results."""

import contextlib
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from minimind.errors import UsageError
from minimind.inference.failures import as_exception
from minimind.inference.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Constraint(Protocol):
    """Restricts the tokens of one completion. Masks may be computed in another thread."""

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` for the next mask; return True when it is ready."""

    def allowed(self) -> Tensor:
        """Return the next mask, [n] bool on the CPU; block until it is ready.

        n is the size of the tokenizer's vocabulary or the number of embedding rows. Ids from n on
        are excluded, and so are ids without a token.
        """

    def advance(self, token: int) -> None:
        """Append a sampled token that is not a stop token."""

    @property
    def is_met(self) -> bool:
        """True when the completion is finished; the engine then stops with reason "stop"."""

    @property
    def is_stuck(self) -> bool:
        """True when the next mask is ready and excludes every token.

        The engine then stops with reason "length".
        """


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    max_new_tokens: None = up to the end of the context.
    stop, stop_ids: strings and token ids that end the text; they are not part of it.
    seed: None = a random one.
    logprobs: number of most likely alternatives to return with each token's log-probability;
        None = no log-probabilities.
    prompt_logprobs: the same for every prompt token but the first; disables prefix caching.
    constraint: must not be shared with another request.
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

    def check(self, context: int) -> None:
        """Raise UsageError when the request cannot be served with this context length."""
        if not self.prompt:
            raise UsageError("the prompt is empty")
        if len(self.prompt) >= context:
            raise UsageError(
                f"the prompt has {len(self.prompt):,} tokens and the model's context is "
                f"{context:,}; shorten it"
            )
        if self.max_new_tokens is not None and self.max_new_tokens < 0:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}; it must be 0 or more")


@dataclass(frozen=True)
class ScoreRequest:
    """Log-likelihoods of candidate continuations of a prompt; nothing is generated.

    Where RoPE scaling depends on the sequence length, all continuations are scored with the length
    of the longest one.
    """

    prompt: Sequence[int]
    continuations: Sequence[Sequence[int]]

    @property
    def input_length(self) -> int:
        """Tokens that the model reads: the last token of a continuation is only a target."""
        return len(self.prompt) + max(map(len, self.continuations)) - 1

    def check(self, context: int) -> None:
        """Raise UsageError when the longest continuation exceeds this context length."""
        assert self.prompt and self.continuations and all(self.continuations), "nothing to score"
        if self.input_length > context:
            raise UsageError(
                f"the text has {self.input_length:,} tokens before its last and the model's "
                f"context is {context:,}; shorten it"
            )


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (natural) of a token, before temperature and penalties.

    top: (token id, log-probability) of the most likely tokens, in descending order.

    Probabilities are normalized over all embedding rows, as in transformers and vLLM. In a model
    with more rows than its tokenizer has tokens, the probabilities of all tokens therefore add up
    to slightly less than 1.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """New text of a completion and its tokens. Only the last piece has a finish_reason.

    prompt_logprobs: of every prompt token but the first, delivered once, before any text.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class GenerationResult:
    """A finished request. error: why it failed; the other fields hold what came before."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    error: Exception | None = None

    @classmethod
    def join(cls, pieces: Sequence[Piece], error: Exception | None) -> "GenerationResult":
        """Join the pieces of a finished request."""
        finish_reason = pieces[-1].finish_reason
        assert finish_reason is not None
        return cls(
            "".join(piece.text for piece in pieces),
            tuple(token for piece in pieces for token in piece.token_ids),
            tuple(entry for piece in pieces for entry in piece.logprobs),
            finish_reason,
            error,
        )


@dataclass(frozen=True)
class EngineStats:
    """Current load of an engine, in requests."""

    running: int
    waiting: int


class Completion:
    """Handle of a submitted request: iterate over its pieces, unless a receiver was given.

    max_new_tokens: limit set by the request and by the context.
    cached_tokens: prompt tokens whose keys and values were taken from the prefix cache.
    scores: log-likelihood of each continuation of a finished ScoreRequest, in nats, normalized as
        in TokenLogprob.
    error: why the finish_reason is "error"; iterating raises it.
    """

    def __init__(
        self,
        request: Request | ScoreRequest,
        max_new_tokens: int,
        receive: Callable[[Piece], None] | None,
    ) -> None:
        self.request = request
        self.max_new_tokens = max_new_tokens
        self.prompt_tokens = len(request.prompt)
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.scores: list[float] = []
        self.error: Exception | None = None
        self.is_cancelled = False
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._receive = self._pieces.put if receive is None else receive

    def __iter__(self) -> Iterator[Piece]:
        while True:
            piece = self._pieces.get()
            if self.error is not None:
                raise self.error
            yield piece
            if piece.finish_reason is not None:
                return

    def cancel(self) -> None:
        """Stop generating; the last piece has the finish_reason "cancelled".

        Does nothing when the request has finished.
        """
        self.is_cancelled = True

    def deliver(self, piece: Piece) -> bool:
        """Pass a piece to the receiver; record its error and return False when it raises."""
        try:
            self._receive(piece)
        except Exception as error:
            self.error = error
            return False
        return True

    def fail(self, error: BaseException) -> None:
        """Deliver the last piece of a request that ends with an error."""
        self.error = as_exception(error)
        with contextlib.suppress(Exception):
            self._receive(Piece("", finish_reason="error"))
