"""The training loop, on runs in memory."""

import copy
import json
import math
import signal
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minimind.data.packing import Batch, ChatSequences, MixedDataset
from minimind.errors import ConfigError, DataError, TrainingError
from minimind.training import trainer as trainer_module
from minimind.training.batch import to_device
from minimind.training.metrics import MetricsLog
from tests.support.devices import NoDoubles
from tests.support.objectives import CORRUPTIONS, Corrupted
from tests.support.small_runs import (
    VOCAB,
    StoppingReporter,
    chat_shard,
    checkpoint_files,
    lora_settings,
    losses,
    metrics,
    nano_trainer,
)


@pytest.mark.parametrize("objective", ["pretrain", "sft", "dpo", "lora", "moe"])
def test_nothing_is_computed_in_float64(tmp_path: Path, objective: str) -> None:
    """Apple's MPS does not support it. Checked on a CPU, validation included."""
    kind = {"lora": "sft", "moe": "pretrain"}.get(objective, objective)
    settings = lora_settings() if objective == "lora" else {}
    preset = "nano-moe" if objective == "moe" else "nano"
    settings |= {"training__steps": 3, "validation__every": 1, "model__preset": preset}
    trainer = nano_trainer(tmp_path, kind, held_out=True, **settings)
    with NoDoubles():
        assert trainer.train().finished


def test_loss_falls(tmp_path: Path) -> None:
    for objective in ("pretrain", "sft"):
        run = tmp_path / objective
        result = nano_trainer(run, objective, held_out=True, training__steps=40).train()
        curve = losses(run)
        assert result.finished and result.steps == len(curve) == 40
        assert abs(curve[0] - math.log(VOCAB)) < 0.5
        assert curve[-1] < curve[0] - 1.0
        assert result.validation["loss"] < curve[0] - 1.0


@pytest.mark.parametrize("stop", [None, 1])
def test_tokens_are_counted_without_padding(tmp_path: Path, stop: int | None) -> None:
    """Two epochs in two steps read all tokens of each conversation except the last."""
    shard = chat_shard()
    lengths = [int(end - start) for start, end in pairwise([0, *shard.ends])]
    sequences = ChatSequences([shard], 32, pad_id=0, seed=7)
    num_tokens = sum(min(length, 33) - 1 for length in lengths)
    assert sequences.report.unsupervised == 0 and num_tokens < len(sequences) * 32
    settings = {"training__steps": 2, "training__global_batch_size": len(sequences)}
    settings |= {"training__micro_batch_size": len(sequences)}
    if stop:
        nano_trainer(tmp_path, "sft", reporter=StoppingReporter(stop), **settings).train()
    result = nano_trainer(tmp_path, "sft", **settings).train()
    assert result.tokens == 2 * num_tokens
    assert [line["tokens"] for line in metrics(tmp_path, "train")] == [num_tokens, 2 * num_tokens]
    lines = (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()
    elapsed = [0.0, *(json.loads(line)["elapsed_s"] for line in lines)]
    for line, (before, now) in zip(lines, pairwise(elapsed), strict=True):
        expected = num_tokens / (now - before)
        assert json.loads(line)["tokens_per_second"] == pytest.approx(expected)


@pytest.mark.numeric
@pytest.mark.parametrize("preset", ["nano", "nano-moe"])
@pytest.mark.parametrize("objective", ["pretrain", "sft", "dpo"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_micro_batch_size_does_not_change_the_losses(
    tmp_path: Path, objective: str, optimizer: str, preset: str
) -> None:
    curves = []
    for micro_batch_size in (1, 2, 4):
        run = tmp_path / f"{micro_batch_size}"
        settings: dict[str, Any] = {
            "training__micro_batch_size": micro_batch_size,
            "training__steps": 5,
            "optim__name": optimizer,
            "model__preset": preset,
        }
        nano_trainer(run, objective, **settings).train()
        curves.append(losses(run))
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


def test_data_cursor_decides_the_samples_of_a_step(tmp_path: Path) -> None:
    """For any micro-batch size, and across interruptions."""

    class Recorded(MixedDataset):
        def batch(self, start: int, count: int) -> Batch:
            built.extend(range(start, start + count))
            return super().batch(start, count)

    for size in (1, 4):
        samples: list[int] = []
        run = tmp_path / f"{size}"
        for stop_at in (3, 7, None):
            built: list[int] = []
            trainer = nano_trainer(
                run,
                reporter=StoppingReporter(stop_at),
                training__micro_batch_size=size,
                training__steps=10,
            )
            trainer.data = Recorded(trainer.data.sources, [1.0], trainer.recipe.seed)
            result = trainer.train()
            assert len(built) <= result.steps * 4 - len(samples) + size, "one batch is prefetched"
            samples += [sample for sample in built if sample < result.steps * 4]
        assert samples == list(range(40))


def prefetching_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("minimind-batches")]


@pytest.mark.parametrize("where", ["shard", "loss", "skipped", "stop", "end"])
def test_prefetching_thread_always_ends(tmp_path: Path, where: str) -> None:
    """The error of a prefetched batch is raised by its step, and not at all without that step."""

    class Damaged(MixedDataset):
        def batch(self, start: int, count: int) -> Batch:
            if start >= 12:
                raise DataError("shard-00001.tokens: cannot be read")
            assert prefetching_threads() == [threading.current_thread()]
            return super().batch(start, count)

    def fail(loss: Tensor) -> Tensor:
        raise ValueError("an unexpected error")

    corruptions = {"loss": fail, "skipped": CORRUPTIONS["loss-nan"]}
    corrupt = corruptions.get(where, lambda loss: loss)
    trainer = nano_trainer(tmp_path, reporter=StoppingReporter(3 if where == "stop" else None))
    trainer.objective = Corrupted(trainer.objective, corrupt, {*range(7, 20)})
    if where in ("shard", "stop"):
        trainer.data = Damaged(trainer.data.sources, [1.0], trainer.recipe.seed)
    errors = {"shard": DataError, "loss": ValueError, "skipped": TrainingError}
    if where in errors:
        with pytest.raises(errors[where]):
            trainer.train()
    else:
        trainer.train()
    steps = {"skipped": 5, "end": 20}.get(where, 3)  # the step that halts the run has no line
    assert [line["step"] for line in metrics(tmp_path, "train")] == list(range(1, steps + 1))
    assert prefetching_threads() == []


def test_metrics_log_is_closed_when_training_cannot_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    class Recorded(MetricsLog):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            opened.append(self)

    def fail(*arguments: Any) -> None:
        raise ConfigError("no such backend")

    monkeypatch.setattr(trainer_module, "MetricsLog", Recorded)
    monkeypatch.setattr(trainer_module, "create_backend", fail)
    with pytest.raises(ConfigError, match="no such backend"):
        nano_trainer(tmp_path).train()
    [log] = opened
    with pytest.raises(ValueError, match="closed file"):
        log.offset  # noqa: B018


@pytest.mark.usefixtures("ordered_event_files")
def test_tensorboard_has_each_step_of_a_resumed_run_once(tmp_path: Path) -> None:
    """The run ends with an error three steps after its checkpoint."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def fail(loss: Tensor) -> Tensor:
        raise ValueError("an unexpected error")

    settings: dict[str, Any] = {"training__trackers": ["tensorboard"], "training__steps": 10}
    settings |= {"checkpoint__every": 4, "held_out": True, "validation__every": 2}
    trainer = nano_trainer(tmp_path, **settings)
    trainer.validate_first = True
    trainer.objective = Corrupted(trainer.objective, fail, {3 + 14 + 3 * 2 + 1})
    with pytest.raises(ValueError, match="unexpected error"):
        trainer.train()
    resumed = nano_trainer(tmp_path, **settings)
    resumed.validate_first = True
    assert resumed.train().finished
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 11))
    assert [e.step for e in events.Scalars("validation/loss")] == list(range(0, 11, 2))


@pytest.mark.numeric
def test_logged_line_is_the_mean_of_its_steps(tmp_path: Path) -> None:
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
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_gradient_is_that_of_the_mean_over_label_tokens(
    tmp_path: Path, micro_batch_size: int
) -> None:
    trainer = nano_trainer(
        tmp_path, "sft", training__steps=1, training__micro_batch_size=micro_batch_size
    )
    model = copy.deepcopy(trainer.model)
    output = trainer.objective.loss(model, to_device(trainer.data.batch(0, 4), trainer.device))
    (output.loss_sum / output.count).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    trainer.train()
    [line] = metrics(tmp_path, "train")
    assert line["num_label_tokens"] == int(output.count) < 4 * 32
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.numeric
def test_gradient_is_clipped(tmp_path: Path) -> None:
    """Adam's first moment after one step shows the size of the clipped gradient."""
    settings: dict[str, Any] = {"training__steps": 1, "optim__name": "adamw", "optim__beta1": 0.5}
    sizes = []
    for max_norm in (1e-3, 1e-4, 1e9):
        run = tmp_path / f"{max_norm}"
        nano_trainer(run, optim__grad_clip=max_norm, **settings).train()
        tensors = load_file(run / "checkpoints" / "step-00000001" / "optimizer.safetensors")
        moments = [t.flatten() for name, t in tensors.items() if name.startswith("exp_avg/")]
        sizes.append(float(torch.cat(moments).norm()) / 0.5)
        norm = metrics(run, "train")[0]["grad_norm"]
    assert sizes == pytest.approx([1e-3, 1e-4, norm], rel=1e-2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_saves_and_restores_the_signal_handlers(
    tmp_path: Path, number: signal.Signals
) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    result = nano_trainer(tmp_path, reporter=StoppingReporter(5, number)).train()
    assert not result.finished
    assert result.steps == 5
    assert (tmp_path / "checkpoints" / "step-00000005").is_dir()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("call", "lora"), [*((call, False) for call in range(1, 9)), (6, True), (7, True)]
)
def test_stop_during_a_step_does_not_wait_for_its_end(
    tmp_path: Path, call: int, lora: bool
) -> None:
    """A large step takes minutes. The resumed run repeats it and ends with the same bits."""

    def stop(loss: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGTERM)
        return loss

    # LoRA with dropout, whose masks must be drawn again.
    steps = {"training__steps": 3, "training__micro_batch_size": 1, "training__log_every": 3}
    settings = lora_settings(**steps) if lora else steps
    uninterrupted, run = tmp_path / "uninterrupted", tmp_path / "run"
    nano_trainer(uninterrupted, **settings).train()
    trainer = nano_trainer(run, **settings)
    trainer.objective = Corrupted(trainer.objective, stop, {call})
    result = trainer.train()
    assert result.steps == (call - 1) // 4
    assert (run / "checkpoints").exists() == (result.steps > 0)
    assert nano_trainer(run, **settings).train().finished
    assert metrics(run) == metrics(uninterrupted)
    assert checkpoint_files(run, 3) == checkpoint_files(uninterrupted, 3)
