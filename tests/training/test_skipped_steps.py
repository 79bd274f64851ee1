"""Non-finite gradients, fp16 loss scaling, and batches without supervised tokens."""

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from minimind.data.packing import IGNORED, ChatSequences
from minimind.data.store import Shard
from minimind.errors import TrainingError
from minimind.training.precision import LossScaler, Precision
from minimind.training.reporter import Reporter
from minimind.training.trainer import Trainer
from tests.support.objectives import CORRUPTIONS, Corrupted
from tests.support.small_runs import (
    RecordingReporter,
    StoppingReporter,
    chat_shard,
    checkpoint_files,
    losses,
    metrics,
    nano_trainer,
    text_shard,
)

# Non-finite gradients.


def corrupted_trainer(
    run: Path, corruption: str, calls: set[int], **settings: Any
) -> tuple[Trainer, RecordingReporter]:
    reporter = RecordingReporter()
    settings = {"checkpoint__every": 1, "checkpoint__keep": 99, "training__steps": 7} | settings
    trainer = nano_trainer(run, reporter=reporter, **settings)
    trainer.objective = Corrupted(trainer.objective, CORRUPTIONS[corruption], calls)
    return trainer, reporter


@pytest.mark.parametrize("calls", [{9}, {10}, {9, 10}], ids=["first", "second", "both"])
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_non_finite_step_changes_nothing_and_is_reported(
    tmp_path: Path, corruption: str, calls: set[int]
) -> None:
    trainer, reporter = corrupted_trainer(tmp_path, corruption, calls)
    assert trainer.train().finished
    assert checkpoint_files(tmp_path, 5) == checkpoint_files(tmp_path, 4)
    assert checkpoint_files(tmp_path, 6) != checkpoint_files(tmp_path, 5)
    assert reporter.lines == ["step 5 (samples 16-19): non-finite gradient; step skipped"]
    expected = [{"kind": "skipped", "step": 5, "samples": [16, 17, 18, 19]}]
    assert metrics(tmp_path, "skipped") == expected
    assert [line["step"] for line in metrics(tmp_path, "train") if line["grad_norm"] is None] == [5]
    assert all(t.isfinite().all() for t in trainer.model.state_dict().values())


@pytest.mark.parametrize("objective", ["pretrain", "dpo"])
def test_logged_means_leave_out_skipped_steps(tmp_path: Path, objective: str) -> None:
    """Steps 2, 5 and 6 of 9 are skipped: lines of three steps are means over the others."""
    reporter = RecordingReporter()
    settings: dict[str, Any] = {"training__steps": 9, "checkpoint__every": 99}
    count_name = "num_pairs" if objective == "dpo" else "num_label_tokens"
    lines = {}
    for log_every in (1, 3):
        run = tmp_path / f"{log_every}"
        trainer = nano_trainer(run, objective, training__log_every=log_every, **settings)
        trainer.objective = Corrupted(trainer.objective, CORRUPTIONS["loss-nan"], {3, 9, 12})
        assert trainer.train().finished
        lines[log_every] = metrics(run, "train")
    single = lines[1]
    assert [line["step"] for line in single if line["loss"] is None] == [2, 5, 6]
    intervals = [[single[0], single[2]], [single[3]], single[6:]]
    assert [line["loss"] for line in lines[3]] == pytest.approx(
        [fmean([x["loss"] for x in steps], [x[count_name] for x in steps]) for steps in intervals],
        rel=1e-5,
    )
    assert all(line["grad_norm"] > 0 for line in lines[3])
    assert [line["tokens"] for line in lines[3]] == [
        line["tokens"] for line in lines[1] if line["step"] % 3 == 0
    ]
    assert reporter.lines == []


def test_line_without_a_finite_step_has_no_loss(tmp_path: Path) -> None:
    trainer, _ = corrupted_trainer(
        tmp_path, "gradient-nan", {9, 12}, training__log_every=2, training__steps=8
    )
    assert trainer.train().finished
    lines = metrics(tmp_path, "train")
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert lines[2]["num_label_tokens"] == 0
    assert {lines[2][key] for key in ("loss", "grad_norm", "grad_norm_max")} == {None}
    assert all(line["loss"] > 0 for line in lines if line["step"] != 6)


def test_two_skipped_steps_in_a_row_do_not_halt_the_run(tmp_path: Path) -> None:
    calls = {9, 11, 15, 17}  # steps 5, 6, 8, 9
    trainer, reporter = corrupted_trainer(tmp_path, "loss-nan", calls, training__steps=10)
    assert trainer.train().finished
    assert len(reporter.lines) == 4
    files = [checkpoint_files(tmp_path, step) for step in (4, 6, 7)]
    assert files[1] == files[0] != files[2]


def test_three_skipped_steps_in_a_row_halt_the_run(tmp_path: Path) -> None:
    trainer, reporter = corrupted_trainer(tmp_path, "gradient-nan", {9, 11, 13, 15})
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    assert str(caught.value).startswith(
        f"{tmp_path}: 3 steps in a row had a non-finite gradient, up to step 7 "
        "(samples 24-27). Set training.precision=fp32, or start over (--fresh) with a lower"
    )
    assert len(reporter.lines) == 3
    assert not reporter.open, "a progress bar that stays open hides the cursor"
    assert checkpoint_files(tmp_path, 6) == checkpoint_files(tmp_path, 4)
    assert [line["step"] for line in metrics(tmp_path, "train")] == [1, 2, 3, 4, 5, 6]


def test_skipped_steps_are_counted_across_a_resume(tmp_path: Path) -> None:
    trainer, _ = corrupted_trainer(tmp_path, "loss-nan", {9, 11})
    trainer.reporter = StoppingReporter(6)
    assert trainer.train().steps == 6
    resumed, _ = corrupted_trainer(tmp_path, "loss-nan", {1})
    with pytest.raises(TrainingError, match=r"3 steps in a row .* up to step 7"):
        resumed.train()
    assert [line["step"] for line in metrics(tmp_path, "skipped")] == [5, 6, 7]


# fp16. A CPU can compute in it too, slowly, on the same path as a GPU without bf16.


def fp16_trainer(
    run: Path, steps: int, reporter: Reporter | None = None, scale: float = 2.0**40
) -> Trainer:
    trainer = nano_trainer(run, training__steps=steps, optim__lr=3e-3, reporter=reporter)
    trainer.precision = Precision("fp16", "cpu", LossScaler(scale, enabled=True))
    return trainer


def test_fp16_trains_like_fp32(tmp_path: Path) -> None:
    fp32 = nano_trainer(tmp_path / "fp32", training__steps=60, optim__lr=3e-3)
    fp16 = fp16_trainer(tmp_path / "fp16", 60, scale=2.0**12)
    fp32.train()
    fp16.train()
    assert fp16.precision.scaler.good_steps == 60, "no step was skipped"
    assert losses(fp16.run) == pytest.approx(losses(fp32.run), rel=0.02)
    assert losses(fp16.run)[-1] < losses(fp16.run)[0] - 0.5


def test_fp16_loss_scale_falls_until_gradients_are_finite(tmp_path: Path) -> None:
    trainer = fp16_trainer(tmp_path, 50)
    trainer.train()
    assert 2.0**8 < trainer.precision.scaler.scale < 2.0**40
    assert trainer.precision.scaler.good_steps > 5
    curve = [loss for loss in losses(tmp_path) if loss is not None]  # of steps that were applied
    assert len(curve) == 50 - len(metrics(tmp_path, "skipped"))
    assert curve[-1] < curve[0] - 0.3


def test_fp16_overflows_are_logged_and_not_reported(tmp_path: Path) -> None:
    reporter = RecordingReporter()
    trainer = fp16_trainer(tmp_path, 40, reporter, scale=2.0**40)
    assert trainer.train().finished
    skipped = metrics(tmp_path, "skipped")
    assert [line["loss_scale"] for line in skipped] == [
        2.0 ** (39 - number) for number in range(len(skipped))
    ]
    assert len(skipped) > 10 and reporter.lines == []


def test_nan_at_the_lowest_fp16_loss_scale_halts_the_run(tmp_path: Path) -> None:
    reporter = RecordingReporter()
    trainer = fp16_trainer(tmp_path, 40, reporter, scale=4.0)
    trainer.objective = Corrupted(trainer.objective, CORRUPTIONS["loss-nan"], {*range(5, 99)})
    with pytest.raises(TrainingError, match=r"3 steps in a row .* up to step 5"):
        trainer.train()
    assert [line["loss_scale"] for line in metrics(tmp_path, "skipped")] == [2.0, 1.0, 1.0]
    assert [line.partition(" (")[0] for line in reporter.lines] == ["step 4", "step 5"]


def test_fp16_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    uninterrupted, run = fp16_trainer(tmp_path / "uninterrupted", 50), tmp_path / "run"
    uninterrupted.train()
    assert fp16_trainer(run, 50, StoppingReporter(27)).train().steps == 27
    resumed = fp16_trainer(run, 50)
    resumed.precision.scaler.scale = 3.0  # the checkpoint overrides it
    assert resumed.train().finished
    assert resumed.precision.scaler == uninterrupted.precision.scaler
    assert checkpoint_files(run, 50) == checkpoint_files(uninterrupted.run, 50)


def test_resuming_without_fp16_halts_after_three_skipped_steps(tmp_path: Path) -> None:
    """And resuming with fp16 starts from its own loss scale. `device` may change on resume."""
    fp16 = fp16_trainer(tmp_path / "fp16", 9, StoppingReporter(4), scale=4.0)
    assert fp16.train().steps == 4
    fp32 = nano_trainer(fp16.run, training__steps=9, optim__lr=3e-3)
    fp32.objective = Corrupted(fp32.objective, CORRUPTIONS["loss-nan"], {*range(1, 99)})
    with pytest.raises(TrainingError, match=r"3 steps in a row .* up to step 7"):
        fp32.train()
    assert fp32.precision.scaler == LossScaler()

    fp32 = nano_trainer(tmp_path / "fp32", training__steps=9, reporter=StoppingReporter(4))
    assert fp32.train().steps == 4
    fp16 = fp16_trainer(fp32.run, 9, scale=2.0**12)
    assert fp16.train().finished
    assert fp16.precision.scaler == LossScaler(2.0**12, enabled=True, good_steps=5)


# No supervised tokens.


def make_chats(*conversations: tuple[int, int]) -> Shard:
    """Build conversations of (length, index of the first answer token); equal: no answer."""
    mask = [position >= answer for length, answer in conversations for position in range(length)]
    ends = torch.tensor([length for length, _ in conversations]).cumsum(0).numpy()
    tokens = text_shard(len(mask)).tokens
    return Shard(tokens, torch.tensor(mask, dtype=torch.uint8).numpy(), ends)


def test_truncated_and_empty_answers_are_counted_and_never_give_nan(tmp_path: Path) -> None:
    unsupervised = [(50, 40), (20, 20), (33, 33), (34, 33), (90, 80)]
    supervised = [(50, 20), (20, 10), (33, 32), (34, 32), (8, 4)]
    sequences = ChatSequences([make_chats(*unsupervised, *supervised)], 32, pad_id=0, seed=0)
    report = sequences.report
    assert report.items == 10
    assert report.unsupervised == 5
    assert report.truncated == 5  # longer than 33 tokens: the last token is only a label
    nano_trainer(tmp_path, "sft", parts=[sequences], held_out=True).train()
    assert all(math.isfinite(loss) for loss in losses(tmp_path))
    assert all(line["num_label_tokens"] > 0 for line in metrics(tmp_path, "train"))


class PartlyUnlabeled(ChatSequences):
    """Sequences of which some have no labels."""

    unlabeled: frozenset[int] = frozenset()

    def sequence(self, index: int) -> Any:
        tokens, labels, segments = super().sequence(index)
        return tokens, labels * 0 + IGNORED if index in self.unlabeled else labels, segments


def test_sequences_without_labels_are_allowed_and_a_batch_of_them_is_an_error(
    tmp_path: Path,
) -> None:
    sequences = PartlyUnlabeled([chat_shard()], 32, pad_id=0, seed=0)
    trainer = nano_trainer(tmp_path / "some", "sft", parts=[sequences])
    batches = [trainer.data.order.locate(4 * step, 4) for step in range(20)]
    sequences.unlabeled = frozenset(index for batch in batches for _, index in batch[1:]) - {
        batch[0][1] for batch in batches
    }
    assert len(sequences.unlabeled) > 5
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "some"))
    sequences.unlabeled = frozenset(index for _, index in batches[3])
    with pytest.raises(TrainingError, match=f"{tmp_path}.*step 4 has no supervised tokens"):
        nano_trainer(tmp_path / "all", "sft", parts=[sequences]).train()
