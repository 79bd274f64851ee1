"""Errors inside a step: of one request, or of the device, which stops the engine."""

import threading
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch

from minimind.errors import ModelError
from minimind.inference.engine import Engine
from minimind.inference.requests import Completion, Piece, Request, ScoreRequest
from minimind.model import PRESETS, ModelConfig, Transformer
from minimind.tokenizer import Tokenizer
from tests.support.decoding import GREEDY

DEVICE_ERROR = "CUDA error: an illegal memory access was encountered"


class Panic(BaseException):
    """A panic in Rust: a BaseException but not an Exception."""


class Failing:
    """Replacement for a method that raises, as every call does on a broken device."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, *arguments: object) -> Any:
        raise self.error


@pytest.fixture
def engine(model: Transformer, tokenizer: Tokenizer) -> Iterator[Engine]:
    with Engine(model, tokenizer, slots=2) as engine:
        yield engine


def break_device(engine: Engine, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    for owner, name in (
        (engine._graphed_model, "forward"),
        (engine.model.cache, "clear"),
        (engine.model.cache, "copy_prefix"),
    ):
        monkeypatch.setattr(owner, name, Failing(error))


def finish_reason_of(completion: Completion) -> str | None:
    """Wait for the finish_reason."""
    try:
        return list(completion)[-1].finish_reason
    except Exception as error:
        assert error is completion.error
        return "error"


@pytest.mark.parametrize(
    "error",
    [RuntimeError(DEVICE_ERROR), torch.AcceleratorError(DEVICE_ERROR), MemoryError(), Panic()],
    ids=lambda error: type(error).__name__,
)
def test_an_error_inside_a_step_ends_all_requests(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    running = [engine.submit(Request([5], GREEDY)) for _ in range(2)]
    for completion in running:
        next(iter(completion))
    waiting = [engine.submit(Request([6], GREEDY)), engine.submit(ScoreRequest([7], [[8, 9]]))]
    assert engine.failure is None
    break_device(engine, monkeypatch, error)
    assert [finish_reason_of(completion) for completion in [*running, *waiting]] == ["error"] * 4
    assert isinstance(engine.failure, Exception)
    assert type(error).__name__ in repr(engine.failure)
    for later in (Request([5], GREEDY), ScoreRequest([7], [[8, 9]])):
        completion = engine.submit(later)
        assert finish_reason_of(completion) == "error"
        assert completion.error is engine.failure
    delivered: list[Piece] = []
    engine.submit(Request([5], GREEDY), delivered.append)
    assert [piece.finish_reason for piece in delivered] == ["error"]
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)
    engine.close()


def test_an_error_in_copying_a_prefix_ends_all_requests(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = [5] * 100
    first = engine.submit(Request([*shared, 1], GREEDY))
    next(iter(first))
    monkeypatch.setattr(engine.model.cache, "copy_prefix", Failing(RuntimeError(DEVICE_ERROR)))
    assert finish_reason_of(engine.submit(Request([*shared, 2], GREEDY))) == "error"
    assert finish_reason_of(first) == "error"
    assert engine.failure is not None


def test_a_receiver_gets_one_last_piece(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    delivered: list[Piece] = []
    started, finished = threading.Event(), threading.Event()

    def deliver(piece: Piece) -> None:
        delivered.append(piece)
        started.set()
        if piece.finish_reason:
            finished.set()

    engine.submit(Request([5], GREEDY), deliver)
    assert started.wait(20)
    break_device(engine, monkeypatch, RuntimeError(DEVICE_ERROR))
    assert finished.wait(20)
    engine.close()
    assert [piece.finish_reason for piece in delivered if piece.finish_reason] == ["error"]


def test_other_engines_of_the_process_keep_running(
    engine: Engine, model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(model, tokenizer, slots=1) as other:
        break_device(engine, monkeypatch, RuntimeError(DEVICE_ERROR))
        assert finish_reason_of(engine.submit(Request([5], GREEDY, 5))) == "error"
        assert finish_reason_of(other.submit(Request([5], GREEDY, 5))) == "length"
        assert other.failure is None


def test_closing_returns_while_a_step_hangs(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, slots=1)
    release, hanging = threading.Event(), threading.Event()
    forward = engine._graphed_model.forward

    def hang(*arguments: Any) -> Any:
        hanging.set()
        release.wait(60)
        return forward(*arguments)

    engine._graphed_model.forward = hang  # type: ignore[method-assign]
    running, waiting = (engine.submit(Request([5], GREEDY)) for _ in range(2))
    assert hanging.wait(20)
    engine.close(seconds=0.1)
    assert [finish_reason_of(running), finish_reason_of(waiting)] == ["error", "error"]
    assert isinstance(engine.failure, TimeoutError)
    release.set()
    assert engine._ended.wait(20)


class FailingConstraint:
    """A constraint that raises at the third token."""

    is_met = is_stuck = False

    def __init__(self, error: BaseException, method: str) -> None:
        self.error, self.method, self.tokens = error, method, 0

    def wait(self, seconds: float) -> bool:
        return True

    def allowed(self) -> torch.Tensor:
        if self.tokens == 3 and self.method == "allowed":
            raise self.error
        return torch.ones(600, dtype=torch.bool)

    def advance(self, token: int) -> None:
        self.tokens += 1
        if self.tokens == 3 and self.method == "advance":
            raise self.error


@pytest.mark.parametrize("method", ["allowed", "advance"])
@pytest.mark.parametrize("error", [ValueError("no"), Panic("no")], ids=["ValueError", "Panic"])
def test_an_error_of_a_constraint_fails_one_request(
    engine: Engine, error: BaseException, method: str
) -> None:
    expected = list(engine.submit(Request([5], GREEDY, 30)))
    good = engine.submit(Request([5], GREEDY, 30))
    bad = engine.submit(Request([5], GREEDY, 30, constraint=FailingConstraint(error, method)))
    assert finish_reason_of(bad) == "error"
    assert "no" in str(bad.error)
    assert [piece.token_ids for piece in good] == [piece.token_ids for piece in expected]
    assert engine.failure is None


def test_an_error_while_finishing_fails_one_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelling decodes the rest of the text too."""
    from minimind.inference.stop_strings import TextStream

    for is_cancelled in (False, True):
        completion = engine.submit(Request([5], GREEDY, None if is_cancelled else 3))
        if is_cancelled:
            next(iter(completion))
        with monkeypatch.context() as patch:
            patch.setattr(TextStream, "finish", Failing(Panic("cannot decode")))
            if is_cancelled:
                completion.cancel()
            assert finish_reason_of(completion) == "error"
    assert finish_reason_of(engine.submit(Request([5], GREEDY, 5))) == "length"


def test_a_failed_request_commits_no_unused_cache(tokenizer: Tokenizer) -> None:
    """Clearing three tokens of a slot leaves the rest of its 256 MiB uncommitted."""
    context = 2**20
    shape = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": context}
    shape |= {"tie_word_embeddings": False}
    model = Transformer(ModelConfig(**PRESETS["nano"] | shape)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[17] = torch.nan
    process = psutil.Process()
    with Engine(model, tokenizer, slots=2) as engine:
        slot_bytes = engine.model.cache.data[:, :, 0].nbytes
        assert slot_bytes >= 256 << 20
        sound = [engine.submit(Request([n + 1] * 120, GREEDY, 3)) for n in range(2)]
        assert [finish_reason_of(completion) for completion in sound] == [
            "length"
        ] * 2  # one in each slot
        before = process.memory_info().rss
        for prompt in ([17], [17, 18, 19], [5] * 100 + [17]):
            for request in (Request(prompt, GREEDY, 3), ScoreRequest(prompt, [[5, 17, 6]])):
                with pytest.raises(ModelError, match="not finite"):
                    list(engine.submit(request))
        grown = process.memory_info().rss - before
        assert grown < 16 << 20
        # No slot keeps values that are not finite.
        assert not engine.model.cache.data[:, :, :, :, :256].isnan().any()


def test_the_cleared_length_includes_the_current_step(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared: list[int] = []
    with Engine(model, tokenizer, slots=1) as engine:
        monkeypatch.setattr(
            engine.model.cache, "clear", lambda slot, length: cleared.append(length)
        )
        for request in (
            Request([5] * 70, GREEDY, 30, constraint=FailingConstraint(ValueError(), "advance")),
            Request([6] * 70, GREEDY, 30, constraint=FailingConstraint(ValueError(), "allowed")),
        ):
            assert finish_reason_of(engine.submit(request)) == "error"
    assert cleared == [72, 73]  # the third token was sampled, but not decoded
