"""Running out of memory: smaller micro-batches, with the same result."""

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minimind.errors import ResourceError
from minimind.training.reporter import Reporter
from tests.support.objectives import Corrupted, LargeInEvaluation, out_of_memory
from tests.support.small_runs import (
    RecordingReporter,
    checkpoint_files,
    lora_settings,
    losses,
    metrics,
    nano_trainer,
)


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> Iterator[None]:
    """Exempt existing objects from garbage collection, which `BatchSizes.reduce` runs often."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.numeric
def test_out_of_memory_reduces_the_micro_batch_size(tmp_path: Path) -> None:
    # With dropout, whose masks must be drawn again.
    expected = nano_trainer(tmp_path / "expected", **lora_settings(training__micro_batch_size=2))
    expected.train()
    reporter = RecordingReporter()
    trainer = nano_trainer(
        tmp_path / "short", reporter=reporter, **lora_settings(training__micro_batch_size=4)
    )
    trainer.objective = Corrupted(trainer.objective, out_of_memory, {1})
    trainer.train()
    assert trainer.batch_sizes.train == 2
    assert metrics(trainer.run) == metrics(expected.run)
    assert checkpoint_files(trainer.run, 20) == checkpoint_files(expected.run, 20)
    assert (
        "step 1: out of memory on cpu at micro-batch size 4; continuing with 2 and more gradient "
        "accumulation"
    ) in reporter.lines


@pytest.mark.numeric
def test_gradients_of_the_unfinished_step_are_discarded(tmp_path: Path) -> None:
    """Memory runs out in the third of four micro-batches of the second step."""
    settings = {
        "training__global_batch_size": 8,
        "training__steps": 4,
        "training__micro_batch_size": 2,
    }
    trainer = nano_trainer(tmp_path / "short", **settings)
    trainer.objective = Corrupted(trainer.objective, out_of_memory, {7})
    trainer.train()
    assert trainer.batch_sizes.train == 1
    curve = losses(trainer.run)
    nano_trainer(tmp_path / "expected", **settings).train()
    assert curve == pytest.approx(losses(tmp_path / "expected"), rel=1e-5)
    assert curve[0] == losses(tmp_path / "expected")[0]
    resumed = nano_trainer(tmp_path / "short", **settings)
    resumed.train()
    assert resumed.batch_sizes.train == 1, "the checkpoint stores the micro-batch size"


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
def test_activations_are_freed_before_the_step_is_repeated(
    tmp_path: Path, where: str, recompute: bool
) -> None:
    """The garbage collector is off, so that `BatchSizes.reduce` has to run it."""
    activations: list[weakref.ref[Tensor]] = []
    num_alive: list[int] = []

    class CountingReporter(Reporter):
        def say(self, text: str) -> None:
            if "out of memory" in text:
                num_alive.append(sum(ref() is not None for ref in activations))

    def record(module: torch.nn.Module, inputs: object, output: Tensor) -> None:
        if not num_alive:
            activations.append(weakref.ref(output))

    def corrupt(loss: Tensor) -> Tensor:
        if where == "forward":
            return out_of_memory()
        layer = trainer.model.model.layers[0]
        layer.register_full_backward_pre_hook(lambda *_: fail_once())
        return loss

    def fail_once() -> None:
        if not num_alive:
            out_of_memory()

    trainer = nano_trainer(
        tmp_path,
        reporter=CountingReporter(),
        training__steps=2,
        training__micro_batch_size=4,
        training__activation_checkpointing=recompute,
    )
    for layer in trainer.model.model.layers:
        layer.register_forward_hook(record)
    trainer.objective = Corrupted(trainer.objective, corrupt, {1})
    gc.disable()
    try:
        trainer.train()
    finally:
        gc.enable()
    assert trainer.batch_sizes.train == 2 and len(activations) >= 2
    assert num_alive == [0]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 5.04 GB, max allowed: 5.10 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:120] DefaultCPUAllocator: can't allocate"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_out_of_memory_errors_of_every_device_are_recognized(
    tmp_path: Path, error: RuntimeError
) -> None:
    def fail(loss: Tensor) -> Tensor:
        raise error

    trainer = nano_trainer(tmp_path, training__steps=2, training__micro_batch_size=4)
    trainer.objective = Corrupted(trainer.objective, fail, {1})
    trainer.train()
    assert trainer.batch_sizes.train == 2


def test_a_single_sequence_that_does_not_fit_ends_the_run(tmp_path: Path) -> None:
    trainer = nano_trainer(tmp_path, training__micro_batch_size=1)
    trainer.objective = Corrupted(trainer.objective, out_of_memory, {1})
    with pytest.raises(ResourceError, match=r"training\.activation_checkpointing=true"):
        trainer.train()


LARGE: dict[str, Any] = {
    "held_out": True,
    "training__steps": 4,
    "training__global_batch_size": 16,
    "training__micro_batch_size": 16,
    "validation__every": 2,
    "validation__num_sequences": 21,
}


@pytest.fixture(scope="module")
def with_enough_memory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that trains with LARGE, once per objective; the run is read-only."""
    runs: dict[str, Path] = {}

    def run(objective: str) -> Path:
        if objective not in runs:
            runs[objective] = tmp_path_factory.mktemp(objective)
            torch.manual_seed(0)
            nano_trainer(runs[objective], objective, **LARGE).train()
        return runs[objective]

    return run


@pytest.mark.parametrize("objective", ["pretrain", "sft", "dpo"])
@pytest.mark.parametrize("max_sequences", [1, 3, 4])
def test_out_of_memory_in_validation_reduces_the_evaluation_batch_size(
    tmp_path: Path,
    objective: str,
    max_sequences: int,
    with_enough_memory: Callable[[str], Path],
) -> None:
    """The micro-batch size of training stays; metrics are the same to rounding."""
    expected = with_enough_memory(objective)
    reporter = RecordingReporter()
    trainer = nano_trainer(tmp_path / "short", objective, reporter=reporter, **LARGE)
    trainer.objective = LargeInEvaluation(trainer.objective, trainer.model, max_sequences)
    assert trainer.train().finished
    too_large = [size for size in (8, 4, 2, 1) if size > max_sequences]
    assert [line for line in reporter.lines if "memory" in line] == [
        f"out of memory on cpu while evaluating {size} sequences; continuing with {size // 2}"
        for size in too_large
    ]
    sizes = trainer.batch_sizes
    assert (sizes.train, sizes.max_eval) == (16, too_large[-1] // 2)
    assert checkpoint_files(trainer.run, 4) == checkpoint_files(expected, 4)
    assert metrics(trainer.run, "train") == metrics(expected, "train")
    lines, expected_lines = (metrics(run, "validation") for run in (trainer.run, expected))
    assert len(lines) == len(expected_lines) == 2
    for line, other in zip(lines, expected_lines, strict=True):
        assert line.pop("kind") == other.pop("kind")
        assert line == pytest.approx(other, rel=1e-5)


def test_evaluation_batches_are_at_most_as_large_as_micro_batches(tmp_path: Path) -> None:
    trainer = nano_trainer(tmp_path, **LARGE | {"training__micro_batch_size": 2})
    trainer.objective = LargeInEvaluation(trainer.objective, trainer.model, 2)
    assert trainer.train().finished and trainer.batch_sizes.max_eval == 8


def test_a_single_sequence_that_does_not_fit_in_validation_ends_the_run(tmp_path: Path) -> None:
    trainer = nano_trainer(tmp_path, **LARGE | {"training__micro_batch_size": 2})
    trainer.objective = LargeInEvaluation(trainer.objective, trainer.model, 0)
    with pytest.raises(ResourceError) as caught:
        trainer.train()
    assert str(caught.value) == (
        f"{tmp_path}: out of memory on cpu while evaluating 1 sequence; "
        "use a smaller model or a shorter data.seq_len, or free memory on the device"
    )
