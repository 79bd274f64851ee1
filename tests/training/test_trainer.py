"""The loop on runs in memory; rows 7 (for one process) and 11 of the reliability promises."""

import copy
import gc
import json
import math
import signal
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minimind.data.packing import IGNORED, Batch, ChatSequences, MixedDataset
from minimind.data.store import Shard
from minimind.errors import ConfigError, DataError, ResourceError, TrainingError
from minimind.inference.generate import write_all
from minimind.inference.sampling import Sampling
from minimind.model import Transformer
from minimind.tokenizer import Tokenizer
from minimind.training import trainer as loop
from minimind.training.batch import TensorBatch, to_device
from minimind.training.metrics import MetricsLog
from minimind.training.objectives import Objective
from minimind.training.precision import LossScaler, Precision
from minimind.training.reporter import Reporter
from minimind.training.trainer import Trainer
from tests.support.devices import NoDoubles
from tests.support.small_runs import (
    VOCAB,
    Stopping,
    Told,
    chat_shard,
    files_of,
    lora_settings,
    losses,
    metrics,
    nano_trainer,
    text_shard,
)


@pytest.mark.parametrize("objective", ["pretrain", "sft", "dpo", "lora", "moe"])
def test_nothing_is_in_double_precision(tmp_path: Path, objective: str) -> None:
    """Which Apple's MPS does not have. A run on a CPU is watched, with its validations."""
    kind = {"lora": "sft", "moe": "pretrain"}.get(objective, objective)
    settings = lora_settings() if objective == "lora" else {}
    preset = "nano-moe" if objective == "moe" else "nano"
    settings |= {"training__steps": 3, "validation__every": 1, "model__preset": preset}
    trainer = nano_trainer(tmp_path, kind, held_out=True, **settings)
    with NoDoubles():
        assert trainer.train().finished


def test_it_learns(tmp_path: Path) -> None:
    for objective in ("pretrain", "sft"):
        run = tmp_path / objective
        outcome = nano_trainer(run, objective, held_out=True, training__steps=40).train()
        curve = losses(run)
        assert outcome.finished and outcome.steps == len(curve) == 40
        assert abs(curve[0] - math.log(VOCAB)) < 0.5
        assert curve[-1] < curve[0] - 1.0
        assert outcome.validation["loss"] < curve[0] - 1.0


@pytest.mark.parametrize("stop", [None, 1])
def test_tokens_are_counted_without_padding(tmp_path: Path, stop: int | None) -> None:
    """Two epochs in two steps: all that the conversations have, but the last token of each."""
    shard = chat_shard()
    lengths = [int(end - start) for start, end in pairwise([0, *shard.ends])]
    sequences = ChatSequences([shard], 32, pad=0, seed=7)
    read = sum(min(length, 33) - 1 for length in lengths)
    assert sequences.report.unsupervised == 0 and read < len(sequences) * 32
    settings = {"training__steps": 2, "training__global_batch_size": len(sequences)}
    settings |= {"training__micro_batch_size": len(sequences)}
    if stop:
        nano_trainer(tmp_path, "sft", reporter=Stopping(stop), **settings).train()
    outcome = nano_trainer(tmp_path, "sft", **settings).train()
    assert outcome.tokens == 2 * read
    assert [line["tokens"] for line in metrics(tmp_path, "train")] == [read, 2 * read]
    lines = (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()
    elapsed = [0.0, *(json.loads(line)["elapsed_s"] for line in lines)]
    for line, (before, now) in zip(lines, pairwise(elapsed), strict=True):
        assert json.loads(line)["tokens_per_second"] == pytest.approx(read / (now - before))


@pytest.mark.numeric
@pytest.mark.parametrize("preset", ["nano", "nano-moe"])
@pytest.mark.parametrize("objective", ["pretrain", "sft", "dpo"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_size_of_a_micro_batch_does_not_matter(
    tmp_path: Path, objective: str, optimizer: str, preset: str
) -> None:
    curves = []
    for micro_batch in (1, 2, 4):
        run = tmp_path / f"{micro_batch}"
        settings: dict[str, Any] = {
            "training__micro_batch_size": micro_batch,
            "optim__name": optimizer,
        }
        settings |= {"training__steps": 8, "model__preset": preset}
        nano_trainer(run, objective, **settings).train()
        curves.append(losses(run))
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


def test_each_step_takes_the_samples_of_its_place_in_the_run(tmp_path: Path) -> None:
    """Whatever the micro-batch, and whether it was interrupted or not."""

    class Recorded(MixedDataset):
        def batch(self, start: int, count: int) -> Batch:
            built.extend(range(start, start + count))
            return super().batch(start, count)

    for micro_batch in (1, 4):
        seen: list[int] = []
        run = tmp_path / f"{micro_batch}"
        for stop_at in (3, 7, None):
            built: list[int] = []
            trainer = nano_trainer(run, training__micro_batch_size=micro_batch, training__steps=10)
            trainer.data = Recorded(trainer.data.parts, [1.0], trainer.recipe.seed)
            trainer.reporter = Stopping(stop_at)
            outcome = trainer.train()
            assert len(built) <= outcome.steps * 4 - len(seen) + micro_batch  # one ahead
            seen += [sample for sample in built if sample < outcome.steps * 4]
        assert seen == list(range(40))


def prefetching_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("minimind-batches")]


@pytest.mark.parametrize("where", ["shard", "loss", "skipped", "stop", "end"])
def test_no_thread_is_left_behind(tmp_path: Path, where: str) -> None:
    """An error in a batch that is built ahead comes when its step does, and not if none comes."""

    class Damaged(MixedDataset):
        def batch(self, start: int, count: int) -> Batch:
            if start >= 12:
                raise DataError("shard-00001.tokens: cannot be read")
            assert prefetching_threads() == [threading.current_thread()]
            return super().batch(start, count)

    def fail(loss: Tensor) -> Tensor:
        raise ValueError("what nobody expects")

    spoils = {"loss": fail, "skipped": SPOILS["loss-nan"]}
    trainer = nano_trainer(tmp_path, reporter=Stopping(3 if where == "stop" else None))
    trainer.objective = Spoilt(trainer.objective, spoils.get(where, lambda loss: loss), {*range(7, 20)})
    if where in ("shard", "stop"):
        trainer.data = Damaged(trainer.data.parts, [1.0], trainer.recipe.seed)
    errors = {"shard": DataError, "loss": ValueError, "skipped": TrainingError}
    if where in errors:
        with pytest.raises(errors[where]):
            trainer.train()
    else:
        trainer.train()
    steps = {"skipped": 5, "end": 20}.get(where, 3)  # the step that halts the run has no line
    assert [line["step"] for line in metrics(tmp_path, "train")] == list(range(1, steps + 1))
    assert prefetching_threads() == []


def test_the_log_is_closed_when_training_cannot_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    class Watched(MetricsLog):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            opened.append(self)

    def fail(*arguments: Any) -> None:
        raise ConfigError("no such engine")

    monkeypatch.setattr(loop, "MetricsLog", Watched)
    monkeypatch.setattr(loop, "_engine", fail)
    with pytest.raises(ConfigError, match="no such engine"):
        nano_trainer(tmp_path).train()
    [log] = opened
    with pytest.raises(ValueError, match="closed file"):
        log.offset  # noqa: B018


@pytest.mark.usefixtures("ordered_event_files")
def test_tensorboard_has_each_step_of_a_resumed_run_once(tmp_path: Path) -> None:
    """The run ended by an error three steps after its checkpoint."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def fail(loss: Tensor) -> Tensor:
        raise ValueError("what nobody expects")

    settings: dict[str, Any] = {"training__trackers": ["tensorboard"], "training__steps": 10}
    settings |= {"checkpoint__every": 4, "held_out": True, "validation__every": 2}
    trainer = nano_trainer(tmp_path, **settings)
    trainer.validate_first = True
    trainer.objective = Spoilt(trainer.objective, fail, {3 + 14 + 3 * 2 + 1})
    with pytest.raises(ValueError, match="nobody expects"):
        trainer.train()
    again = nano_trainer(tmp_path, **settings)
    again.validate_first = True
    assert again.train().finished
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 11))
    assert [e.step for e in events.Scalars("validation/loss")] == list(range(0, 11, 2))


def test_validation_and_samples_leave_training_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Validating every 5 or every 50 steps, writing in between or not: the same bits."""

    def written(model: Transformer) -> Callable[[], list[dict[str, str]]]:
        def write() -> list[dict[str, str]]:
            model.eval()
            [tokens] = write_all(
                model, tokenizer, [[1, 2, 3]], max_new_tokens=5, sampling=Sampling(temperature=1.0)
            )
            model.train()
            return [{"prompt": "1 2 3", "text": " ".join(map(str, tokens))}]

        return write

    results = []
    for every, samples in ((50, False), (5, False), (5, True)):
        run = tmp_path / f"{every}-{samples}"
        trainer = nano_trainer(run, held_out=True, validation__every=every, training__steps=20)
        if samples:
            trainer.write_samples = written(trainer.model)
        trainer.train()
        assert len(metrics(run, "validation")) == (4 if every == 5 else 1)
        assert len(metrics(run, "sample")) == (4 if samples else 0)
        results.append((losses(run), files_of(run, 20)))
    assert results[1] == results[0]
    assert results[2] == results[0]


def test_without_held_out_windows_there_is_no_validation(tmp_path: Path) -> None:
    outcome = nano_trainer(tmp_path, validation__every=2).train()
    assert outcome.validation == {}
    assert metrics(tmp_path, "validation") == []


@pytest.mark.numeric
def test_a_line_is_the_mean_of_its_steps(tmp_path: Path) -> None:
    nano_trainer(tmp_path / "1", training__steps=7).train()
    nano_trainer(tmp_path / "3", training__steps=7, training__log_every=3).train()
    single = losses(tmp_path / "1")
    lines = metrics(tmp_path / "3", "train")
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert [line["tokens"] for line in lines] == [3 * 128, 6 * 128, 7 * 128]
    assert [line["num_label_tokens"] for line in lines] == [3 * 128, 3 * 128, 128]
    means = [sum(single[:3]) / 3, sum(single[3:6]) / 3, single[6]]
    assert [line["loss"] for line in lines] == pytest.approx(means, rel=1e-6)
    norms = [line["grad_norm"] for line in metrics(tmp_path / "1", "train")]
    means = [sum(norms[:3]) / 3, sum(norms[3:6]) / 3, norms[6]]
    assert [line["grad_norm"] for line in lines] == pytest.approx(means, rel=1e-6)
    largest = [max(norms[:3]), max(norms[3:6]), norms[6]]
    assert [line["grad_norm_max"] for line in lines] == largest


@pytest.mark.numeric
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_the_gradient_is_that_of_the_mean_over_what_is_learned(
    tmp_path: Path, micro_batch: int
) -> None:
    trainer = nano_trainer(tmp_path, "sft", training__steps=1, training__micro_batch_size=micro_batch)
    model = copy.deepcopy(trainer.model)
    batch = to_device(trainer.data.batch(0, 4), trainer.device)
    loss, count, _ = trainer.objective.loss(model, batch)
    (loss / count).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    trainer.train()
    [line] = metrics(tmp_path, "train")
    assert line["num_label_tokens"] == int(count) < 4 * 32
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.numeric
def test_the_gradient_is_clipped(tmp_path: Path) -> None:
    """A tenth of the norm allowed is a tenth of the gradient, which plain momentum shows."""
    settings: dict[str, Any] = {"training__steps": 1, "optim__name": "adamw", "optim__beta1": 0.5}
    sizes = []
    for most in (1e-3, 1e-4, 1e9):
        nano_trainer(tmp_path / f"{most}", optim__grad_clip=most, **settings).train()
        place = tmp_path / f"{most}" / "checkpoints" / "step-00000001" / "optimizer.safetensors"
        tensors = load_file(place)
        moments = [t.flatten() for name, t in tensors.items() if name.startswith("exp_avg/")]
        sizes.append(float(torch.cat(moments).norm()) / 0.5)
        norm = metrics(tmp_path / f"{most}", "train")[0]["grad_norm"]
    assert sizes == pytest.approx([1e-3, 1e-4, norm], rel=1e-2)


# Being asked to stop.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_and_gives_the_signals_back(tmp_path: Path, number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    outcome = nano_trainer(tmp_path, reporter=Stopping(5, number)).train()
    assert not outcome.finished
    assert outcome.steps == 5
    assert (tmp_path / "checkpoints" / "step-00000005").is_dir()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("call", "lora"), [*((call, False) for call in range(1, 9)), (6, True), (7, True)]
)
def test_a_stop_in_the_middle_of_a_step_does_not_wait_for_its_end(
    tmp_path: Path, call: int, lora: bool
) -> None:
    """A large step takes minutes. What was done of it is done again, and the end is the same."""

    def stop(loss: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGTERM)
        return loss

    # With dropout, which must draw the same numbers again for the step that was not finished.
    steps = {"training__steps": 3, "training__micro_batch_size": 1, "training__log_every": 3}
    settings = lora_settings(**steps) if lora else steps
    whole, run = tmp_path / "whole", tmp_path / "run"
    nano_trainer(whole, **settings).train()
    trainer = nano_trainer(run, **settings)
    trainer.objective = Spoilt(trainer.objective, stop, {call})
    outcome = trainer.train()
    assert outcome.steps == (call - 1) // 4
    assert (run / "checkpoints").exists() == (outcome.steps > 0)
    assert nano_trainer(run, **settings).train().finished
    assert metrics(run) == metrics(whole)
    assert files_of(run, 3) == files_of(whole, 3)


def test_a_stop_in_the_middle_of_a_validation_does_not_wait_for_its_end(tmp_path: Path) -> None:
    """A validation may take minutes too. The run that goes on begins with it."""

    def stop(loss: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGTERM)
        return loss

    settings: dict[str, Any] = {"held_out": True, "training__steps": 6, "validation__every": 2}
    settings |= {"validation__num_sequences": 20, "training__micro_batch_size": 4}  # in five parts
    whole = tmp_path / "whole"
    ended = nano_trainer(whole, **settings).train()
    for validation, call in ((1, 4), (2, 10), (3, 21)):  # its second, first and last part
        run = tmp_path / f"{validation}"
        trainer = nano_trainer(run, **settings)
        trainer.objective = Spoilt(trainer.objective, stop, {call})
        outcome = trainer.train()
        assert (outcome.steps, outcome.finished) == (2 * validation, False)
        assert len(metrics(run, "validation")) == validation - 1
        again = nano_trainer(run, **settings).train()
        assert (again.finished, again.best) == (True, ended.best)
        assert metrics(run) == metrics(whole)
        assert files_of(run, 6) == files_of(whole, 6)


# Running out of memory.


def out_of_memory(loss: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.numeric
def test_where_memory_runs_out_fewer_windows_are_taken_at_once(tmp_path: Path) -> None:
    # With dropout, which must draw the same numbers again.
    wanted = nano_trainer(tmp_path / "wanted", **lora_settings(training__micro_batch_size=2))
    wanted.train()
    reporter = Told()
    trainer = nano_trainer(
        tmp_path / "short", reporter=reporter, **lora_settings(training__micro_batch_size=4)
    )
    trainer.objective = Spoilt(trainer.objective, out_of_memory, {1})
    trainer.train()
    assert trainer.micro_batch == 2
    assert metrics(trainer.run) == metrics(wanted.run)
    assert files_of(trainer.run, 20) == files_of(wanted.run, 20)
    assert "step 1: too little memory on cpu for 4 windows at once; going on with 2" in (
        "\n".join(reporter.lines)
    )


@pytest.mark.numeric
def test_what_is_left_of_the_step_is_forgotten(tmp_path: Path) -> None:
    """It ran out in the third of four parts of the second step."""
    settings = {
        "training__global_batch_size": 8,
        "training__steps": 4,
        "training__micro_batch_size": 2,
    }
    trainer = nano_trainer(tmp_path / "short", **settings)
    trainer.objective = Spoilt(trainer.objective, out_of_memory, {7})
    trainer.train()
    assert trainer.micro_batch == 1
    found = losses(trainer.run)
    nano_trainer(tmp_path / "wanted", **settings).train()
    assert found == pytest.approx(losses(tmp_path / "wanted"), rel=1e-5)
    assert found[0] == losses(tmp_path / "wanted")[0]
    again = nano_trainer(tmp_path / "short", **settings)
    again.train()
    assert again.micro_batch == 1  # it is remembered


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed-again"])
def test_what_filled_the_memory_is_gone_before_it_goes_on(
    tmp_path: Path, where: str, again: bool
) -> None:
    """Everything that the failed part has computed, while collecting garbage is left to us."""
    computed: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Looking(Reporter):
        def say(self, text: str) -> None:
            if "too little memory" in text:
                alive.append(sum(one() is not None for one in computed))

    def keep(module: torch.nn.Module, given: object, out: Tensor) -> None:
        if not alive:
            computed.append(weakref.ref(out))

    def spoil(loss: Tensor) -> Tensor:
        if where == "forward":
            return out_of_memory(loss)
        layer = trainer.model.model.layers[0]
        layer.register_full_backward_pre_hook(lambda *_: fail())
        return loss

    def fail() -> None:
        if not alive:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    trainer = nano_trainer(
        tmp_path,
        reporter=Looking(),
        training__steps=2,
        training__micro_batch_size=4,
        training__activation_checkpointing=again,
    )
    for layer in trainer.model.model.layers:
        layer.register_forward_hook(keep)
    trainer.objective = Spoilt(trainer.objective, spoil, {1})
    gc.disable()
    try:
        trainer.train()
    finally:
        gc.enable()
    assert trainer.micro_batch == 2 and len(computed) >= 2
    assert alive == [0]


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
def test_short_memory_is_known_by_whatever_tells_it(tmp_path: Path, error: RuntimeError) -> None:
    def fail(loss: Tensor) -> Tensor:
        raise error

    trainer = nano_trainer(tmp_path, training__steps=2, training__micro_batch_size=4)
    trainer.objective = Spoilt(trainer.objective, fail, {1})
    trainer.train()
    assert trainer.micro_batch == 2


def test_one_window_at_once_that_does_not_fit_ends_the_run(tmp_path: Path) -> None:
    trainer = nano_trainer(tmp_path, training__micro_batch_size=1)
    trainer.objective = Spoilt(trainer.objective, out_of_memory, {1})
    with pytest.raises(ResourceError, match=r"training\.activation_checkpointing=true"):
        trainer.train()


@dataclass
class Large:
    """An objective for which memory runs out with more than `fits` windows in a validation."""

    objective: Objective
    model: Transformer
    fits: int

    def loss(
        self, model: Transformer, batch: TensorBatch
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if not self.model.training and len(batch.tokens) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.objective.loss(model, batch)

    def metrics(self, loss: float, sums: dict[str, float]) -> dict[str, float]:
        return self.objective.metrics(loss, sums)

    def note(self, metrics: dict[str, float]) -> str:
        return self.objective.note(metrics)

    def warning(self, share: float, metrics: dict[str, float]) -> str | None:
        return self.objective.warning(share, metrics)


LARGE: dict[str, Any] = {"held_out": True, "training__steps": 4, "validation__every": 2}
LARGE |= {
    "training__global_batch_size": 16,
    "training__micro_batch_size": 16,
    "validation__num_sequences": 21,
}


@pytest.mark.parametrize("objective", ["pretrain", "sft", "dpo"])
@pytest.mark.parametrize("fits", [1, 3, 4])
def test_where_a_validation_runs_out_of_memory_it_takes_fewer_windows(
    tmp_path: Path, objective: str, fits: int
) -> None:
    """From then on; the steps keep what fits them, and the figures are the same to rounding."""
    whole, told = nano_trainer(tmp_path / "whole", objective, **LARGE), Told()
    whole.train()
    trainer = nano_trainer(tmp_path / "short", objective, reporter=told, **LARGE)
    trainer.objective = Large(trainer.objective, trainer.model, fits)
    assert trainer.train().finished
    sizes = [size for size in (8, 4, 2, 1) if size > fits]
    assert [line for line in told.lines if "memory" in line] == [
        f"too little memory on cpu to evaluate {size} windows at once; "
        f"{size // 2} window{'s' * (size > 2)} from now on"
        for size in sizes
    ]
    assert (trainer.micro_batch, trainer.max_eval_batch) == (16, sizes[-1] // 2)
    assert files_of(trainer.run, 4) == files_of(whole.run, 4)
    assert metrics(trainer.run, "train") == metrics(whole.run, "train")
    found, wanted = (metrics(one.run, "validation") for one in (trainer, whole))
    assert len(found) == len(wanted) == 2
    for line, other in zip(found, wanted, strict=True):
        assert line.pop("kind") == other.pop("kind")
        assert line == pytest.approx(other, rel=1e-5)


def test_a_validation_takes_no_more_windows_than_a_step(tmp_path: Path) -> None:
    trainer = nano_trainer(tmp_path, **LARGE | {"training__micro_batch_size": 2})
    trainer.objective = Large(trainer.objective, trainer.model, 2)
    assert trainer.train().finished and trainer.max_eval_batch == 8


def test_a_validation_of_one_window_that_does_not_fit_ends_the_run(tmp_path: Path) -> None:
    trainer = nano_trainer(tmp_path, **LARGE | {"training__micro_batch_size": 2})
    trainer.objective = Large(trainer.objective, trainer.model, 0)
    with pytest.raises(ResourceError) as caught:
        trainer.train()
    assert str(caught.value) == (
        f"{tmp_path}: too little memory on cpu to evaluate 1 window at once, which is the least; "
        "take a smaller model or a shorter data.seq_len, or free memory on the device"
    )


# The best.


@dataclass
class Judged:
    """An objective whose validations come out as given."""

    objective: Objective
    model: Transformer
    values: list[float]

    def loss(
        self, model: Transformer, batch: TensorBatch
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return self.objective.loss(model, batch)

    def metrics(self, loss: float, sums: dict[str, float]) -> dict[str, float]:
        metrics = self.objective.metrics(loss, sums)
        judged = {} if self.model.training else {"bits_per_byte": self.values.pop(0)}
        return metrics | judged

    def note(self, metrics: dict[str, float]) -> str:
        return ""

    def warning(self, share: float, metrics: dict[str, float]) -> str | None:
        return None


@pytest.mark.parametrize(
    ("keep_best", "left"), [(True, [8, 20, 22]), (False, [20, 22])], ids=["kept", "not-kept"]
)
def test_the_best_by_validation_is_saved_and_kept(
    tmp_path: Path, keep_best: bool, left: list[int]
) -> None:
    settings: dict[str, Any] = {"training__steps": 22, "validation__every": 4}
    settings |= {"checkpoint__every": 5, "checkpoint__keep_best": keep_best}
    values = [3.0, 2.0, math.nan, 2.5, 2.0, 4.0]  # of steps 4, 8, 12, 16, 20, 22
    for stops in ((), (9, 21)):
        run = tmp_path / f"{len(stops)}"
        to_come = list(values)
        for stop in (*stops, None):
            trainer = nano_trainer(run, held_out=True, reporter=Stopping(stop), **settings)
            trainer.objective = Judged(trainer.objective, trainer.model, to_come)
            outcome = trainer.train()
        assert outcome.best == {"step": 8, "metric": "bits_per_byte", "value": 2.0}
        saved = sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())
        assert saved == (left if not stops else sorted({*left, 21} - {20}))


def test_without_bits_per_byte_the_loss_tells_which_is_the_best(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"training__steps": 30, "optim__lr": 3e-3}
    outcome = nano_trainer(tmp_path, "dpo", held_out=True, **settings).train()
    lines = {line["step"]: line["loss"] for line in metrics(tmp_path, "validation")}
    best = min(lines, key=lambda step: lines[step])
    assert outcome.best == {"step": best, "metric": "loss", "value": lines[best]}


# Half precision: on a CPU, which can do fp16 too, only slowly; the very path of an older GPU.


def fp16_run(
    run: Path, steps: int, reporter: Told | None = None, scale: float = 2.0**40
) -> Trainer:
    trainer = nano_trainer(run, training__steps=steps, optim__lr=3e-3, reporter=reporter)
    trainer.precision = Precision("fp16", "cpu", LossScaler(scale, enabled=True))
    return trainer


def test_training_in_fp16_learns_as_in_fp32(tmp_path: Path) -> None:
    exact = nano_trainer(tmp_path / "fp32", training__steps=60, optim__lr=3e-3)
    rough = fp16_run(tmp_path / "fp16", 60, scale=2.0**12)
    exact.train()
    rough.train()
    assert rough.precision.scaler.good_steps == 60  # none was skipped
    assert losses(rough.run) == pytest.approx(losses(exact.run), rel=0.02)
    assert losses(rough.run)[-1] < losses(rough.run)[0] - 0.5


def test_training_in_fp16_finds_its_scale(tmp_path: Path) -> None:
    trainer = fp16_run(tmp_path, 50)
    trainer.train()
    assert 2.0**8 < trainer.precision.scaler.scale < 2.0**40
    assert trainer.precision.scaler.good_steps > 5
    curve = [loss for loss in losses(tmp_path) if loss is not None]  # of steps that were taken
    assert len(curve) == 50 - len(metrics(tmp_path, "skipped"))
    assert curve[-1] < curve[0] - 0.3


def test_finding_the_scale_of_fp16_is_written_down_and_no_alarm(tmp_path: Path) -> None:
    told = Told()
    trainer = fp16_run(tmp_path, 40, told, scale=2.0**40)
    assert trainer.train().finished
    skipped = metrics(tmp_path, "skipped")
    assert [line["loss_scale"] for line in skipped] == [
        2.0 ** (39 - number) for number in range(len(skipped))
    ]
    assert len(skipped) > 10 and told.lines == []


def test_numbers_that_no_scale_cures_are_reported_and_halt_a_run_in_fp16(tmp_path: Path) -> None:
    told = Told()
    trainer = fp16_run(tmp_path, 40, told, scale=4.0)
    trainer.objective = Spoilt(trainer.objective, SPOILS["loss-nan"], {*range(5, 99)})
    with pytest.raises(TrainingError, match=r"3 steps in a row .* up to step 5"):
        trainer.train()
    assert [line["loss_scale"] for line in metrics(tmp_path, "skipped")] == [2.0, 1.0, 1.0]
    assert [line.partition(" (")[0] for line in told.lines] == ["step 4", "step 5"]


def test_a_run_in_fp16_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, stopped = fp16_run(tmp_path / "whole", 50), tmp_path / "stopped"
    whole.train()
    assert fp16_run(stopped, 50, Stopping(27)).train().steps == 27
    again = fp16_run(stopped, 50)
    again.precision.scaler.scale = 3.0  # what the checkpoint says counts
    assert again.train().finished
    assert again.precision.scaler == whole.precision.scaler
    assert files_of(stopped, 50) == files_of(whole.run, 50)


# Row 7: bad numbers.


@dataclass
class Spoilt:
    """An objective that goes bad at some calls: two calls are a step here."""

    objective: Objective
    spoil: Callable[[Tensor], Tensor]
    calls: set[int]
    call: int = 0

    def loss(
        self, model: Transformer, batch: TensorBatch
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss, count, more = self.objective.loss(model, batch)
        self.call += 1
        return (self.spoil(loss) if self.call in self.calls else loss), count, more

    def metrics(self, loss: float, sums: dict[str, float]) -> dict[str, float]:
        return self.objective.metrics(loss, sums)

    def note(self, metrics: dict[str, float]) -> str:
        return self.objective.note(metrics)

    def warning(self, share: float, metrics: dict[str, float]) -> str | None:
        return self.objective.warning(share, metrics)


def bad_gradient(loss: Tensor) -> Tensor:
    """The same loss, whose gradient is not a number."""
    return loss + (loss * 0.0).sqrt() * 0.0


def endless_gradient(loss: Tensor) -> Tensor:
    """The same loss, whose gradient is infinite."""
    return loss + (loss - loss.detach()) * 1e38 * 1e38


SPOILS: dict[str, Callable[[Tensor], Tensor]] = {
    "loss-nan": lambda loss: loss * math.nan,
    "loss-inf": lambda loss: loss * math.inf,
    "gradient": bad_gradient,
    "gradient-inf": endless_gradient,
}


def spoilt(run: Path, spoil: str, calls: set[int], **settings: Any) -> tuple[Trainer, Told]:
    told = Told()
    settings = {"checkpoint__every": 1, "checkpoint__keep": 99, "training__steps": 7} | settings
    trainer = nano_trainer(run, reporter=told, **settings)
    trainer.objective = Spoilt(trainer.objective, SPOILS[spoil], calls)
    return trainer, told


@pytest.mark.parametrize("calls", [{9}, {10}, {9, 10}], ids=["first", "second", "both"])
@pytest.mark.parametrize("spoil", SPOILS)
def test_a_bad_step_changes_nothing_and_is_told(
    tmp_path: Path, spoil: str, calls: set[int]
) -> None:
    trainer, told = spoilt(tmp_path, spoil, calls)
    assert trainer.train().finished
    assert files_of(tmp_path, 5) == files_of(tmp_path, 4)
    assert files_of(tmp_path, 6) != files_of(tmp_path, 5)
    assert told.lines == [
        "step 5 (samples 16-19): the gradient is not finite; nothing was changed by it"
    ]
    written = [{"kind": "skipped", "step": 5, "samples": [16, 17, 18, 19]}]
    assert metrics(tmp_path, "skipped") == written
    assert [line["step"] for line in metrics(tmp_path, "train") if line["grad_norm"] is None] == [5]
    assert all(t.isfinite().all() for t in trainer.model.state_dict().values())


@pytest.mark.parametrize("objective", ["pretrain", "dpo"])
def test_a_skipped_step_loses_its_own_loss_alone(tmp_path: Path, objective: str) -> None:
    """Steps 2, 5 and 6 of 9 are skipped: the lines of three steps are means over the others."""
    told = Told()
    settings: dict[str, Any] = {"training__steps": 9, "checkpoint__every": 99}
    lines = {}
    for log_every in (1, 3):
        run = tmp_path / f"{log_every}"
        trainer = nano_trainer(run, objective, training__log_every=log_every, **settings)
        trainer.objective = Spoilt(trainer.objective, SPOILS["loss-nan"], {3, 9, 12})
        assert trainer.train().finished
        lines[log_every] = metrics(run, "train")
    single = lines[1]
    assert [line["step"] for line in single if line["loss"] is None] == [2, 5, 6]
    taken = [[single[0], single[2]], [single[3]], single[6:]]
    assert [line["loss"] for line in lines[3]] == pytest.approx(
        [fmean([x["loss"] for x in few], [x["num_label_tokens"] for x in few]) for few in taken],
        rel=1e-5,
    )
    assert all(line["grad_norm"] > 0 for line in lines[3])
    assert [line["tokens"] for line in lines[3]] == [
        line["tokens"] for line in lines[1] if line["step"] % 3 == 0
    ]
    assert told.lines == []


def test_a_line_of_skipped_steps_has_no_loss(tmp_path: Path) -> None:
    trainer, _ = spoilt(tmp_path, "gradient", {9, 12}, training__log_every=2, training__steps=8)
    assert trainer.train().finished
    lines = metrics(tmp_path, "train")
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert lines[2]["num_label_tokens"] == 0
    assert {lines[2][key] for key in ("loss", "grad_norm", "grad_norm_max")} == {None}
    assert all(line["loss"] > 0 for line in lines if line["step"] != 6)


def test_two_bad_steps_in_a_row_are_passed(tmp_path: Path) -> None:
    calls = {9, 11, 15, 17}  # steps 5, 6, 8, 9
    trainer, told = spoilt(tmp_path, "loss-nan", calls, training__steps=10)
    assert trainer.train().finished
    assert len(told.lines) == 4
    assert files_of(tmp_path, 6) == files_of(tmp_path, 4) != files_of(tmp_path, 7)


def test_the_third_halts_the_run_with_the_reason(tmp_path: Path) -> None:
    trainer, told = spoilt(tmp_path, "gradient", {9, 11, 13, 15})
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    assert str(caught.value).startswith(
        f"{tmp_path}: 3 steps in a row gave numbers that are not finite, up to step 7 "
        "(samples 24-27). Try a lower optim.lr"
    )
    assert len(told.lines) == 3
    assert not told.open, "a progress bar that is left open hides the cursor"
    assert files_of(tmp_path, 6) == files_of(tmp_path, 4)
    assert [line["step"] for line in metrics(tmp_path, "train")] == [1, 2, 3, 4, 5, 6]


def test_they_are_counted_over_an_interruption(tmp_path: Path) -> None:
    trainer, _ = spoilt(tmp_path, "loss-nan", {9, 11})
    trainer.reporter = Stopping(6)
    assert trainer.train().steps == 6
    again, _ = spoilt(tmp_path, "loss-nan", {1})
    with pytest.raises(TrainingError, match=r"3 steps in a row .* up to step 7"):
        again.train()
    assert [line["step"] for line in metrics(tmp_path, "skipped")] == [5, 6, 7]


# Row 11: nothing to learn.


def chats(*conversations: tuple[int, int]) -> Shard:
    """Conversations by their length and the first token of their answer (as long: no answer)."""
    mask = [place >= answer for length, answer in conversations for place in range(length)]
    ends = torch.tensor([length for length, _ in conversations]).cumsum(0).numpy()
    tokens = text_shard(len(mask)).tokens
    return Shard(tokens, torch.tensor(mask, dtype=torch.uint8).numpy(), ends)


def test_answers_that_are_cut_away_or_empty_are_counted_and_never_nan(tmp_path: Path) -> None:
    bad = [(50, 40), (20, 20), (33, 33), (34, 33), (90, 80)]
    good = [(50, 20), (20, 10), (33, 32), (34, 32), (8, 4)]
    sequences = ChatSequences([chats(*bad, *good)], 32, pad=0, seed=0)
    report = sequences.report
    assert report.conversations == 10
    assert report.unsupervised == 5  # all of the bad ones
    assert report.cut == 5  # longer than 33 tokens: the last token is only a label
    nano_trainer(tmp_path, "sft", parts=[sequences], held_out=True).train()
    assert all(math.isfinite(loss) for loss in losses(tmp_path))
    assert all(line["num_label_tokens"] > 0 for line in metrics(tmp_path, "train"))


class Unlearned(ChatSequences):
    """Windows of which some have no labels."""

    empty: frozenset[int] = frozenset()

    def sequence(self, index: int) -> Any:
        tokens, labels, segments = super().sequence(index)
        return tokens, labels * 0 + IGNORED if index in self.empty else labels, segments


def test_windows_without_labels_are_no_harm_but_a_whole_batch_of_them_is(tmp_path: Path) -> None:
    sequences = Unlearned([chat_shard()], 32, pad=0, seed=0)
    trainer = nano_trainer(tmp_path / "some", "sft", parts=[sequences])
    batches = [trainer.data.order.locate(4 * step, 4) for step in range(20)]
    sequences.empty = frozenset(index for batch in batches for _, index in batch[1:]) - {
        batch[0][1] for batch in batches
    }
    assert len(sequences.empty) > 5
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "some"))
    sequences.empty = frozenset(index for _, index in batches[3])
    with pytest.raises(TrainingError, match=f"{tmp_path}.*a whole batch has nothing to learn"):
        nano_trainer(tmp_path / "all", "sft", parts=[sequences]).train()
