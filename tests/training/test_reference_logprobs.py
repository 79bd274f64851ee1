"""Reference log-probabilities of DPO: computed once, cached and verified."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from minimind.config.settings import Recipe
from minimind.data.packing import MixedDataset, PairSequences
from minimind.errors import CheckpointError, DataError, ResourceError
from minimind.model import Transformer
from minimind.training import reference_logprobs as reference
from minimind.training.batch import TensorBatch
from minimind.training.reference_logprobs import compute_reference_logprobs
from minimind.training.stage import StageResult, run_stage
from minimind.training.trainer import Trainer
from tests.support.small_runs import (
    RecordingReporter,
    StoppingReporter,
    losses,
    metrics,
    nano_recipe,
    nano_trainer,
    pair_shard,
)


def cached(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / reference.FILE)


def pair_sequences(trainer: Trainer) -> PairSequences:
    [part] = trainer.data.sources
    assert isinstance(part, PairSequences)
    return part


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "sigmoid_norm"])
def test_first_loss_is_that_of_a_zero_margin(tmp_path: Path, precision: str, loss: str) -> None:
    """In any precision, since the reference is computed in the batches and kernels of training."""
    settings = {"training__precision": precision, "dpo__loss": loss, "training__steps": 2}
    nano_trainer(tmp_path, "dpo", held_out=True, **settings).train()
    first = metrics(tmp_path, "train")[0]
    expected = 25.0 if loss == "ipo" else math.log(2)
    assert first["loss"] == pytest.approx(expected, rel=1e-6)
    assert first["accuracy"] == 0.5
    assert first["rewards/margin"] == 0


def test_margin_grows(tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = nano_trainer(run, "dpo", held_out=True, training__steps=80, optim__lr=3e-3).train()
    curve = losses(run)
    assert curve[-1] < curve[0] - 0.2
    assert outcome.validation["accuracy"] > 0.95
    assert outcome.validation["rewards/margin"] > 0.5
    last = metrics(run, "train")[-1]
    assert last["rewards/margin"] == pytest.approx(
        last["rewards/chosen"] - last["rewards/rejected"]
    )
    assert last["num_pairs"] > 4, "several pairs per sequence"


def test_too_low_learning_rate_is_warned_about(tmp_path: Path) -> None:
    for lr, num_warnings in ((1e-9, 1), (3e-3, 0)):
        reporter = RecordingReporter()
        settings = {"optim__lr": lr, "optim__muon_lr": lr, "reporter": reporter}
        nano_trainer(tmp_path / f"{lr}", "dpo", training__steps=40, **settings).train()
        assert sum("the model is not learning" in line for line in reporter.lines) == num_warnings


def test_warning_comes_at_the_same_step_after_a_resume(tmp_path: Path) -> None:
    """The first line after a resume is checked; only that of the first step is not."""
    rate = {"optim__lr": 1e-9, "optim__muon_lr": 1e-9, "training__steps": 20}
    nano_trainer(tmp_path, "dpo", reporter=StoppingReporter(5), **rate).train()
    again = RecordingReporter()
    nano_trainer(tmp_path, "dpo", reporter=again, **rate).train()
    [warning] = [line for line in again.lines if "the model is not learning" in line]
    assert warning.startswith("after 30% of the run")


def test_reference_logprobs_of_several_epochs_and_a_weighted_mix(tmp_path: Path) -> None:
    """They are computed for the sequences that the run reads, and for no others."""
    trainer = nano_trainer(tmp_path, "dpo", training__steps=1)
    parts = [PairSequences([pair_shard(n)], 32, pad=0, seed=n) for n in (40, 60)]
    trainer.data = type(trainer.data)(list(parts), [2.0, 0.4], seed=1)
    trainer.num_steps = -(-2 * trainer.data.order.epoch_size // 4)
    (tmp_path / reference.FILE).unlink()
    compute_reference_logprobs(trainer)
    assert np.isfinite(parts[0].reference).all()
    sequences = {
        index for part, index in trainer.data.order.locate(0, 4 * trainer.num_steps) if part == 1
    }
    assert sequences and len(sequences) < len(parts[1])
    for index in range(len(parts[1])):
        known = np.isfinite(parts[1].reference[parts[1].item_slice(index)]).all()
        assert known == (index in sequences)
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(tmp_path))


@pytest.mark.parametrize("held_out", [False, True], ids=["training", "held-out"])
def test_out_of_memory_reduces_the_batch_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: bool
) -> None:
    """Training keeps the smaller size, so that the first loss is that of a zero margin."""
    real, reporter = reference.answer_logps, RecordingReporter()
    held_out_data = MixedDataset([PairSequences([pair_shard(80)], 32, pad=0, seed=3)], [1.0], 3)

    def short(model: Transformer, batch: TensorBatch) -> tuple[Tensor, Tensor]:
        if len(batch.tokens) > 1 and torch.is_grad_enabled() != held_out:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(model, batch)

    trainer = nano_trainer(tmp_path, "dpo", reporter=reporter, training__micro_batch_size=4)
    before = pair_sequences(trainer).reference.copy()
    pair_sequences(trainer).reference[:] = np.nan
    (tmp_path / reference.FILE).unlink()
    trainer.held_out = held_out_data
    monkeypatch.setattr(reference, "answer_logps", short)
    compute_reference_logprobs(trainer)
    where = "out of memory on cpu"
    assert reporter.lines == (
        [
            f"{where} while evaluating 4 sequences; continuing with 2",
            f"{where} while evaluating 2 sequences; continuing with 1",
        ]
        if held_out
        else [
            f"reference log-probabilities of step 1: {where} at micro-batch size {size}; "
            f"continuing with {size // 2} and more gradient accumulation"
            for size in (4, 2)
        ]
    )
    sizes = trainer.batch_sizes
    assert (sizes.train, sizes.eval) == ((4, 1) if held_out else (1, 1))
    np.testing.assert_allclose(pair_sequences(trainer).reference, before, rtol=1e-5)
    sequences = min(trainer.recipe.validation.num_sequences, held_out_data.order.epoch_size)
    assert not any(
        np.isnan(x).any()
        for x in held_out_data.references(held_out_data.order.locate(0, sequences))
    )
    reporter.lines.clear()
    trainer.train()
    assert losses(tmp_path)[0] == pytest.approx(math.log(2), rel=1e-6)


def test_a_single_sequence_that_does_not_fit_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(model: Transformer, batch: TensorBatch) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(reference, "answer_logps", short)
    with pytest.raises(ResourceError, match=r"step 1: .* training\.activation_checkpointing=true"):
        nano_trainer(tmp_path, "dpo", training__micro_batch_size=1)


def test_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = nano_trainer(tmp_path, "dpo")
    with monkeypatch.context() as patched:
        patched.setattr(Transformer, "forward", None)  # the model cannot be called
        cached_trainer = nano_trainer(tmp_path, "dpo")
    assert (pair_sequences(cached_trainer).reference == pair_sequences(computed).reference).all()


@pytest.mark.parametrize("damage", ["flip", "truncated", "empty", "other"])
def test_damaged_or_foreign_cache_is_computed_again(tmp_path: Path, damage: str) -> None:
    expected = nano_trainer(tmp_path, "dpo")
    path = tmp_path / reference.FILE
    content = path.read_bytes()
    if damage == "other":
        reporter = RecordingReporter()
        nano_trainer(tmp_path, "dpo", reporter=reporter, seed=8)
        nano_trainer(tmp_path, "dpo", reporter=reporter)
        assert (
            sum("belongs to other data, settings or weights" in line for line in reporter.lines)
            == 2
        )
    else:
        positions = range(0, len(content), 37) if damage == "flip" else [0]
        again = nano_trainer(tmp_path, "dpo")
        for position in positions:
            flipped = bytearray(content)
            flipped[position] ^= 1 << (position % 8)
            path.write_bytes(
                {"flip": bytes(flipped), "truncated": content[:-9], "empty": b""}[damage],
            )
            reporter = again.reporter = RecordingReporter()
            pair_sequences(again).reference[:] = np.nan
            compute_reference_logprobs(again)
            assert any(
                f"{path} cannot be used and is computed again" in line for line in reporter.lines
            ), position
            assert (pair_sequences(again).reference == pair_sequences(expected).reference).all()
    reporter = RecordingReporter()
    assert (
        pair_sequences(nano_trainer(tmp_path, "dpo", reporter=reporter)).reference >= -1e9
    ).all()
    assert reporter.lines == []


def test_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference, "save_file", full)
    with pytest.raises(ResourceError, match=r"cannot be written .*it needs [0-9,]+ bytes"):
        nano_trainer(tmp_path, "dpo")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def base(corpus: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a pretraining run of a few steps."""
    folder = tmp_path_factory.mktemp("base")
    settings = {"data__sources": [str(corpus / "text.jsonl")], "tokenizer": str(tokenizer_dir)}
    settings |= {"training__steps": 3, "data__store": str(folder / "stores")}
    run_stage(nano_recipe("pretrain", folder / "run", **settings), reporter=RecordingReporter())
    return folder / "run"


def recipe(base: Path, run: Path, file: Path, **settings: Any) -> Recipe:
    defaults = {
        "model__init": str(base),
        "data__sources": [str(file)],
        "data__store": str(run.parent / "stores"),
        "data__validation_fraction": 0.1,
        "data__seq_len": 64,
        "training__steps": 6,
    }
    return nano_recipe("dpo", run, **defaults | settings)


def train(recipe: Recipe, reporter: RecordingReporter, **options: Any) -> StageResult:
    return run_stage(recipe, reporter=reporter, **options)


def test_dpo_stage_from_files(base: Path, corpus: Path, tmp_path: Path) -> None:
    reporter, run = RecordingReporter(), tmp_path / "run"
    result = train(recipe(base, run, corpus / "pairs.jsonl"), reporter)
    assert result.model == run / "model"
    before, after = metrics(run, "validation")
    assert (before["step"], before["accuracy"]) == (0, 0.5)
    assert before["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert result.summary["accuracy"] == after["accuracy"]
    assert any(
        "pairs in" in line and "chosen and rejected are identical" in line
        for line in reporter.lines
    )
    assert set(cached(run)) == {"train.0", "held_out.0"}
    train(recipe(base, run, corpus / "pairs.jsonl", training__steps=3), reporter, fresh=True)
    assert losses(run)[0] == pytest.approx(math.log(2), rel=1e-6)


def test_lora_uses_its_base_model_as_the_reference(
    base: Path, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = {"lora": {"rank": 4, "dropout": 0.1}, "optim__name": "adamw", "optim__lr": 3e-3}
    settings |= {"training__steps": 30, "training__log_every": 1}
    result = train(recipe(base, run, corpus / "pairs.jsonl", **settings), RecordingReporter())
    assert result.adapter == run / "adapter" and not (run / "model").exists()
    first = metrics(run, "validation")[0]
    assert first["step"] == 0 and first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    curve = losses(run)
    assert curve[0] == pytest.approx(math.log(2), rel=1e-6)
    assert curve[-1] < 0.65


def test_run_does_not_resume_after_its_base_model_changed(
    base: Path, corpus: Path, tmp_path: Path
) -> None:
    own, run = tmp_path / "own", tmp_path / "run"
    settings = {"data__sources": [str(corpus / "text.jsonl")], "data__store": str(tmp_path / "s")}
    settings |= {"model__init": str(base), "training__steps": 1}
    run_stage(nano_recipe("pretrain", own, **settings), reporter=RecordingReporter())
    started = recipe(own, run, corpus / "pairs.jsonl")
    train(started, RecordingReporter())
    (run / "summary.json").unlink()  # as if the run had been stopped
    run_stage(
        nano_recipe("pretrain", own, **settings, seed=3), reporter=RecordingReporter(), fresh=True
    )
    with pytest.raises(CheckpointError, match="is not the base model that this run began with"):
        train(started, RecordingReporter())


def test_chat_data_is_an_error_and_pairs_without_answers_are_left_out(
    base: Path, corpus: Path, tmp_path: Path
) -> None:
    """Invalid lines are skipped, unusable pairs are counted, and no loss is NaN."""
    with pytest.raises(DataError, match=r"no preference pairs found .*chosen and rejected"):
        train(recipe(base, tmp_path / "no", corpus / "chat.jsonl"), RecordingReporter())
    long_prompt = "长江" * 60  # fills the sequence
    same = {"prompt": "长江？", "chosen": "很长。", "rejected": "很长。"}
    with (tmp_path / "pairs.jsonl").open("w", encoding="utf-8") as stream:
        for line in (corpus / "pairs.jsonl").read_text("utf-8").splitlines():
            stream.write(line + "\n")
        stream.write(
            json.dumps({"prompt": long_prompt, "chosen": "是。", "rejected": "不。"}) + "\n"
        )
        stream.write(json.dumps(same) + "\n")
        stream.write('{"prompt": "长江？", "chosen": "很长。"\n')
        stream.write('{"prompt": "长江？", "chosen": "", "rejected": "不。"}\n')
    reporter, run = RecordingReporter(), tmp_path / "run"
    settings = {"data__validation_fraction": 0.0, "training__steps": 60}
    train(recipe(base, run, tmp_path / "pairs.jsonl", **settings), reporter)
    output = "\n".join(reporter.lines)
    assert "invalid records: 2, see" in output
    assert "202 pairs in" in output
    assert (
        "1 left out because they have no supervised tokens, "
        "1 because chosen and rejected are identical" in output
    )
    assert all(math.isfinite(loss) for loss in losses(run))
    assert all(line["num_pairs"] > 0 for line in metrics(run, "train"))
