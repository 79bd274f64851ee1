"""Errors inside a step: of one request, or of the device, after which the engine stops."""

import threading
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch

from minimind.errors import ModelError
from minimind.inference.engine import Engine
from minimind.inference.requests import Completion, Piece, Request, ScoreRequest
from minimind.inference.sampling import Sampling
from minimind.model import PRESETS, ModelConfig, Transformer
from minimind.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0)
DEVICE_ERROR = "CUDA error: an illegal memory access was encountered"


class Panic(BaseException):
    """What a panic in Rust is raised as: not an Exception."""


class Failing:
    """Stands in for a method that raises from now on, as every call does on a broken device."""

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


def ending(completion: Completion) -> str | None:
    """The finish_reason; waits for it."""
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
    assert [ending(completion) for completion in [*running, *waiting]] == ["error"] * 4
    assert isinstance(engine.failure, Exception)
    assert type(error).__name__ in repr(engine.failure)
    for later in (Request([5], GREEDY), ScoreRequest([7], [[8, 9]])):
        completion = engine.submit(later)
        assert ending(completion) == "error"
        assert completion.error is engine.failure
    told: list[Piece] = []
    engine.submit(Request([5], GREEDY), told.append)
    assert [piece.finish_reason for piece in told] == ["error"]
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)
    engine.close()


def test_an_error_in_copying_a_prefix_ends_all_requests(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = [5] * 100
    first = engine.submit(Request([*shared, 1], GREEDY))
    next(iter(first))
    monkeypatch.setattr(engine.model.cache, "copy_prefix", Failing(RuntimeError(DEVICE_ERROR)))
    assert ending(engine.submit(Request([*shared, 2], GREEDY))) == "error"
    assert ending(first) == "error"
    assert engine.failure is not None


def test_a_receiver_hears_of_the_end_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Piece] = []
    began, ended = threading.Event(), threading.Event()

    def deliver(piece: Piece) -> None:
        told.append(piece)
        began.set()
        if piece.finish_reason:
            ended.set()

    engine.submit(Request([5], GREEDY), deliver)
    assert began.wait(20)
    break_device(engine, monkeypatch, RuntimeError(DEVICE_ERROR))
    assert ended.wait(20)
    engine.close()
    assert [piece.finish_reason for piece in told if piece.finish_reason] == ["error"]


def test_another_engine_of_the_process_is_not_stopped(
    engine: Engine, model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(model, tokenizer, slots=1) as other:
        break_device(engine, monkeypatch, RuntimeError(DEVICE_ERROR))
        assert ending(engine.submit(Request([5], GREEDY, 5))) == "error"
        assert ending(other.submit(Request([5], GREEDY, 5))) == "length"
        assert other.failure is None


def test_closing_returns_while_a_step_hangs(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, slots=1)
    release, hangs = threading.Event(), threading.Event()
    forward = engine._graphed_model.forward

    def hang(*arguments: Any) -> Any:
        hangs.set()
        release.wait(60)
        return forward(*arguments)

    engine._graphed_model.forward = hang  # type: ignore[method-assign]
    running, waiting = (engine.submit(Request([5], GREEDY)) for _ in range(2))
    assert hangs.wait(20)
    engine.close(seconds=0.1)
    assert [ending(running), ending(waiting)] == ["error", "error"]
    assert isinstance(engine.failure, TimeoutError)
    release.set()
    assert engine._ended.wait(20)


class Bad:
    """A constraint of one request that fails after some tokens."""

    is_met = is_stuck = False

    def __init__(self, error: BaseException, where: str) -> None:
        self.error, self.where, self.tokens = error, where, 0

    def wait(self, seconds: float) -> bool:
        return True

    def allowed(self) -> torch.Tensor:
        if self.tokens == 3 and self.where == "allowed":
            raise self.error
        return torch.ones(600, dtype=torch.bool)

    def advance(self, token: int) -> None:
        self.tokens += 1
        if self.tokens == 3 and self.where == "advance":
            raise self.error


@pytest.mark.parametrize("where", ["allowed", "advance"])
@pytest.mark.parametrize("error", [ValueError("no"), Panic("no")], ids=["ValueError", "Panic"])
def test_the_fault_of_one_request_is_its_own(
    engine: Engine, error: BaseException, where: str
) -> None:
    wanted = list(engine.submit(Request([5], GREEDY, 30)))
    good = engine.submit(Request([5], GREEDY, 30))
    bad = engine.submit(Request([5], GREEDY, 30, constraint=Bad(error, where)))
    assert ending(bad) == "error"
    assert "no" in str(bad.error)
    assert [piece.token_ids for piece in good] == [piece.token_ids for piece in wanted]
    assert engine.failure is None


def test_an_error_at_the_end_of_a_text_is_its_own(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of one that is cancelled: what is left of its text is decoded then."""
    from minimind.inference.stop_strings import TextStream

    for is_cancelled in (False, True):
        completion = engine.submit(Request([5], GREEDY, None if is_cancelled else 3))
        if is_cancelled:
            next(iter(completion))
        with monkeypatch.context() as patch:
            patch.setattr(TextStream, "finish", Failing(Panic("cannot decode")))
            if is_cancelled:
                completion.cancel()
            assert ending(completion) == "error"
    assert ending(engine.submit(Request([5], GREEDY, 5))) == "length"


def test_a_failed_request_takes_no_memory_beyond_its_own(tokenizer: Tokenizer) -> None:
    """A slot of 256 MiB stays unused where three tokens of it are."""
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
        assert [ending(completion) for completion in sound] == ["length"] * 2  # in either slot
        before = process.memory_info().rss
        for prompt in ([17], [17, 18, 19], [5] * 100 + [17]):
            for request in (Request(prompt, GREEDY, 3), ScoreRequest(prompt, [[5, 17, 6]])):
                with pytest.raises(ModelError, match="not finite"):
                    list(engine.submit(request))
        grown = process.memory_info().rss - before
        assert grown < 16 << 20
        # What it wrote is gone, in each of the slots.
        assert not engine.model.cache.data[:, :, :, :, :256].isnan().any()


def test_what_a_step_has_written_is_known(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wiped: list[int] = []
    with Engine(model, tokenizer, slots=1) as engine:
        monkeypatch.setattr(engine.model.cache, "clear", lambda slot, length: wiped.append(length))
        for request in (
            Request([5] * 70, GREEDY, 30, constraint=Bad(ValueError(), "advance")),
            Request([6] * 70, GREEDY, 30, constraint=Bad(ValueError(), "allowed")),
        ):
            assert ending(engine.submit(request)) == "error"
    assert wiped == [72, 73]  # the third token was chosen, but not read
