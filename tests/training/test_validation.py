"""Validation during training, and the best checkpoint."""

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from minimind.errors import UsageError
from minimind.inference.generate import generate_all
from minimind.inference.sampling import Sampling
from minimind.model import Transformer
from minimind.tokenizer import Tokenizer
from minimind.training.validation import EvalSet
from tests.support.objectives import Corrupted, PresetValidation
from tests.support.small_runs import (
    RecordingReporter,
    StoppingReporter,
    checkpoint_files,
    losses,
    metrics,
    nano_trainer,
)


def test_validation_and_samples_do_not_change_training(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Validate every 5 or 50 steps, with and without samples: the same bits."""

    def sampler(model: Transformer) -> Callable[[], list[dict[str, str]]]:
        def generate() -> list[dict[str, str]]:
            model.eval()
            [tokens] = generate_all(
                model, tokenizer, [[1, 2, 3]], max_new_tokens=5, sampling=Sampling(temperature=1.0)
            )
            model.train()
            return [{"prompt": "1 2 3", "text": " ".join(map(str, tokens))}]

        return generate

    results = []
    for every, samples in ((50, False), (5, False), (5, True)):
        run = tmp_path / f"{every}-{samples}"
        trainer = nano_trainer(run, held_out=True, validation__every=every, training__steps=20)
        if samples:
            trainer.generate_samples = sampler(trainer.model)
        trainer.train()
        assert len(metrics(run, "validation")) == (4 if every == 5 else 1)
        assert len(metrics(run, "sample")) == (4 if samples else 0)
        results.append((losses(run), checkpoint_files(run, 20)))
    assert results[1] == results[0]
    assert results[2] == results[0]


def test_without_held_out_data_there_is_no_validation(tmp_path: Path) -> None:
    trainer = nano_trainer(tmp_path, validation__every=10)
    trainer.generate_samples = lambda: [{"prompt": "1", "text": "2"}]
    result = trainer.train()
    assert result.validation == {}
    assert metrics(tmp_path, "validation") == []
    assert [line["step"] for line in metrics(tmp_path, "sample")] == [10, 20]


def test_samples_that_cannot_be_generated_are_reported(tmp_path: Path) -> None:
    def fail() -> list[dict[str, str]]:
        raise UsageError("the prompt is empty")

    trainer = nano_trainer(tmp_path, held_out=True, validation__every=10)
    trainer.reporter = reporter = RecordingReporter()
    trainer.generate_samples = fail
    assert trainer.train().finished
    assert "step 10: no samples: the prompt is empty" in reporter.lines
    assert [line["step"] for line in metrics(tmp_path, "validation")] == [10, 20]


def test_a_retention_set_alone_selects_no_best_checkpoint(tmp_path: Path) -> None:
    trainer = nano_trainer(tmp_path, validation__every=10)
    trainer.retention = EvalSet(trainer.objective, [trainer.data])
    result = trainer.train()
    assert result.validation.keys() == {"retention_loss", "retention_bits_per_byte"}
    assert (result.finished, result.best) == (True, {})
    assert [line["step"] for line in metrics(tmp_path, "validation")] == [10, 20]


def test_stop_during_validation_does_not_wait_for_its_end(tmp_path: Path) -> None:
    """A validation may take minutes. The resumed run repeats it first."""

    def stop(loss: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGTERM)
        return loss

    settings: dict[str, Any] = {"held_out": True, "training__steps": 6, "validation__every": 2}
    settings |= {"validation__num_sequences": 20, "training__micro_batch_size": 4}  # five batches
    uninterrupted = tmp_path / "uninterrupted"
    expected = nano_trainer(uninterrupted, **settings).train()
    for validation, call in ((1, 4), (2, 10), (3, 21)):  # its second, first and last batch
        run = tmp_path / f"{validation}"
        trainer = nano_trainer(run, **settings)
        trainer.objective = Corrupted(trainer.objective, stop, {call})
        result = trainer.train()
        assert (result.steps, result.finished) == (2 * validation, False)
        assert len(metrics(run, "validation")) == validation - 1
        resumed = nano_trainer(run, **settings).train()
        assert (resumed.finished, resumed.best) == (True, expected.best)
        assert metrics(run) == metrics(uninterrupted)
        assert checkpoint_files(run, 6) == checkpoint_files(uninterrupted, 6)


@pytest.mark.parametrize(
    ("keep_best", "steps"), [(True, [8, 20, 22]), (False, [20, 22])], ids=["kept", "not-kept"]
)
def test_best_checkpoint_by_validation_is_saved_and_kept(
    tmp_path: Path, keep_best: bool, steps: list[int]
) -> None:
    settings: dict[str, Any] = {"training__steps": 22, "validation__every": 4}
    settings |= {"checkpoint__every": 5, "checkpoint__keep_best": keep_best}
    values = [3.0, 2.0, math.nan, 2.5, 2.0, 4.0]  # of steps 4, 8, 12, 16, 20, 22
    for stops in ((), (9, 21)):
        run = tmp_path / f"{len(stops)}"
        remaining = list(values)
        for stop in (*stops, None):
            trainer = nano_trainer(run, held_out=True, reporter=StoppingReporter(stop), **settings)
            trainer.objective = PresetValidation(trainer.objective, trainer.model, remaining)
            result = trainer.train()
        assert result.best == {"step": 8, "metric": "bits_per_byte", "value": 2.0}
        saved = sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())
        assert saved == (steps if not stops else sorted({*steps, 21} - {20}))


def test_loss_selects_the_best_checkpoint_without_bits_per_byte(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"training__steps": 30, "optim__lr": 3e-3}
    result = nano_trainer(tmp_path, "dpo", held_out=True, **settings).train()
    lines = {line["step"]: line["loss"] for line in metrics(tmp_path, "validation")}
    best = min(lines, key=lambda step: lines[step])
    assert result.best == {"step": best, "metric": "loss", "value": lines[best]}
