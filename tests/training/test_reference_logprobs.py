"""Preference runs: what they begin with is kept, checked, and never asked for twice."""

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
from minimind.training.trainer import Trainer, train
from tests.support.small_runs import (
    Stopping,
    Told,
    losses,
    metrics,
    nano_recipe,
    nano_trainer,
    pair_shard,
)


def kept(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / reference.FILE)


def windows_of(job: Trainer) -> PairSequences:
    [part] = job.data.sources
    assert isinstance(part, PairSequences)
    return part


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "sigmoid_norm"])
def test_the_first_loss_is_that_of_no_difference(tmp_path: Path, precision: str, loss: str) -> None:
    """In any precision: the reference is asked in the batches and with the kernels of its turn."""
    settings = {"training__precision": precision, "dpo__loss": loss, "training__steps": 2}
    train(nano_trainer(tmp_path, "dpo", held_out=True, **settings))
    first = metrics(tmp_path, "train")[0]
    expected = 25.0 if loss == "ipo" else math.log(2)
    assert first["loss"] == pytest.approx(expected, rel=1e-6)
    assert first["accuracy"] == 0.5
    assert first["rewards/margin"] == 0


def test_the_two_sides_part(tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = train(nano_trainer(run, "dpo", held_out=True, training__steps=80, optim__lr=3e-3))
    curve = losses(run)
    assert curve[-1] < curve[0] - 0.2
    assert outcome.validation["accuracy"] > 0.95
    assert outcome.validation["rewards/margin"] > 0.5
    last = metrics(run, "train")[-1]
    assert last["rewards/margin"] == pytest.approx(
        last["rewards/chosen"] - last["rewards/rejected"]
    )
    assert last["num_label_tokens"] > 4, "pairs, several a window"


def test_a_rate_that_is_too_small_is_told(tmp_path: Path) -> None:
    for lr, told in ((1e-9, 1), (3e-3, 0)):
        reporter = Told()
        settings = {"optim__lr": lr, "optim__muon_lr": lr, "reporter": reporter}
        train(nano_trainer(tmp_path / f"{lr}", "dpo", training__steps=40, **settings))
        assert sum("nothing is learned" in line for line in reporter.lines) == told


def test_it_is_told_at_the_same_step_after_a_resume(tmp_path: Path) -> None:
    """The first line after a resume is judged: only that of the first step is not."""
    rate = {"optim__lr": 1e-9, "optim__muon_lr": 1e-9, "training__steps": 20}
    train(nano_trainer(tmp_path, "dpo", reporter=Stopping(5), **rate))
    again = Told()
    train(nano_trainer(tmp_path, "dpo", reporter=again, **rate))
    [warning] = [line for line in again.lines if "nothing is learned" in line]
    assert warning.startswith("after 30% of the run")


def test_several_epochs_and_a_weighted_mix_keep_to_the_reference(tmp_path: Path) -> None:
    """Of every window that the run comes to, and of no other, the log-probabilities are known."""
    job = nano_trainer(tmp_path, "dpo", training__steps=1)
    parts = [PairSequences([pair_shard(n)], 32, pad=0, seed=n) for n in (40, 60)]
    job.data = type(job.data)(list(parts), [2.0, 0.4], seed=1)
    job.num_steps = -(-2 * job.data.order.epoch_size // 4)
    (tmp_path / reference.FILE).unlink()
    compute_reference_logprobs(job)
    assert np.isfinite(parts[0].reference).all()
    sequences = {index for part, index in job.data.order.locate(0, 4 * job.num_steps) if part == 1}
    assert sequences and len(sequences) < len(parts[1])
    for index in range(len(parts[1])):
        known = np.isfinite(parts[1].reference[parts[1].item_slice(index)]).all()
        assert known == (index in sequences)
    train(job)
    assert all(math.isfinite(loss) for loss in losses(tmp_path))


@pytest.mark.parametrize("held_out", [False, True], ids=["training", "held-out"])
def test_where_memory_runs_out_fewer_windows_are_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: bool
) -> None:
    """Training then takes no more either: the first loss is that of no difference."""
    real, told = reference.answer_logps, Told()
    held = MixedDataset([PairSequences([pair_shard(80)], 32, pad=0, seed=3)], [1.0], 3)

    def short(model: Transformer, batch: TensorBatch) -> tuple[Tensor, Tensor]:
        if len(batch.tokens) > 1 and torch.is_grad_enabled() != held_out:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(model, batch)

    job = nano_trainer(tmp_path, "dpo", reporter=told, training__micro_batch_size=4)
    before = windows_of(job).reference.copy()
    windows_of(job).reference[:] = np.nan
    (tmp_path / reference.FILE).unlink()
    job.held_out = held
    monkeypatch.setattr(reference, "answer_logps", short)
    compute_reference_logprobs(job)
    where = "too little memory on cpu"
    assert told.lines == (
        [
            f"{where} to evaluate 4 windows at once; 2 windows from now on",
            f"{where} to evaluate 2 windows at once; 1 window from now on",
        ]
        if held_out
        else [
            f"reference log-probabilities of step 1: {where} for {size} windows at once; going on "
            f"with {size // 2}, the batch in more parts"
            for size in (4, 2)
        ]
    )
    assert (job.micro_batch, job.eval_batch) == ((4, 1) if held_out else (1, 1))
    np.testing.assert_allclose(windows_of(job).reference, before, rtol=1e-5)
    sequences = min(job.recipe.validation.num_sequences, held.order.epoch_size)
    assert not any(np.isnan(x).any() for x in held.references(held.order.locate(0, sequences)))
    told.lines.clear()
    train(job)
    assert losses(tmp_path)[0] == pytest.approx(math.log(2), rel=1e-6)


def test_references_of_one_window_that_does_not_fit_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(model: Transformer, batch: TensorBatch) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(reference, "answer_logps", short)
    with pytest.raises(ResourceError, match=r"step 1: .* training\.activation_checkpointing=true"):
        nano_trainer(tmp_path, "dpo", training__micro_batch_size=1)


def test_they_are_kept_and_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = nano_trainer(tmp_path, "dpo")
    with monkeypatch.context() as patched:
        patched.setattr(Transformer, "forward", None)  # whoever asks the model fails
        found = nano_trainer(tmp_path, "dpo")
    assert (windows_of(found).reference == windows_of(asked).reference).all()


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "other"])
def test_what_was_changed_is_noticed_and_made_again(tmp_path: Path, harm: str) -> None:
    whole = nano_trainer(tmp_path, "dpo")
    path = tmp_path / reference.FILE
    content = path.read_bytes()
    if harm == "other":
        told = Told()
        nano_trainer(tmp_path, "dpo", reporter=told, seed=8)
        nano_trainer(tmp_path, "dpo", reporter=told)
        assert sum("of other data, settings or weights" in line for line in told.lines) == 2
    else:
        places = range(0, len(content), 37) if harm == "flip" else [0]
        for place in places:
            spoilt = bytearray(content)
            spoilt[place] ^= 1 << (place % 8)
            path.write_bytes(
                {"flip": bytes(spoilt), "cut": content[:-9], "empty": b""}[harm],
            )
            told = Told()
            again = nano_trainer(tmp_path, "dpo", reporter=told)
            assert any(f"{path} is not used, and made again" in line for line in told.lines), place
            assert (windows_of(again).reference == windows_of(whole).reference).all()
    told = Told()
    assert (windows_of(nano_trainer(tmp_path, "dpo", reporter=told)).reference >= -1e9).all()
    assert told.lines == []


def test_no_room_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference, "save_file", full)
    with pytest.raises(ResourceError, match=r"cannot be written .*it needs [0-9,]+ bytes"):
        nano_trainer(tmp_path, "dpo")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def base(corpus: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps of pretraining."""
    folder = tmp_path_factory.mktemp("base")
    settings = {"data__sources": [str(corpus / "text.jsonl")], "tokenizer": str(tokenizer_dir)}
    settings |= {"training__steps": 3, "data__store": str(folder / "stores")}
    run_stage(nano_recipe("pretrain", folder / "run", **settings), reporter=Told())
    return folder / "run"


def recipe(base: Path, run: Path, file: Path, **settings: Any) -> Recipe:
    given = {
        "model__init": str(base),
        "data__sources": [str(file)],
        "data__store": str(run.parent / "stores"),
        "data__validation_fraction": 0.1,
        "data__seq_len": 64,
        "training__steps": 6,
    }
    return nano_recipe("dpo", run, **given | settings)


def do(recipe: Recipe, told: Told, **options: Any) -> StageResult:
    return run_stage(recipe, reporter=told, **options)


def test_a_stage_from_files(base: Path, corpus: Path, tmp_path: Path) -> None:
    told, run = Told(), tmp_path / "run"
    result = do(recipe(base, run, corpus / "pairs.jsonl"), told)
    assert result.model == run / "model"
    before, after = metrics(run, "validation")
    assert (before["step"], before["accuracy"]) == (0, 0.5)
    assert before["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert result.summary["accuracy"] == after["accuracy"]
    assert any(
        "pairs in" in line and "chosen and rejected are identical" in line for line in told.lines
    )
    assert set(kept(run)) == {"train.0", "held_out.0"}
    do(recipe(base, run, corpus / "pairs.jsonl", training__steps=3), told, fresh=True)
    assert losses(run)[0] == pytest.approx(math.log(2), rel=1e-6)


def test_adapters_are_trained_with_their_base_as_the_reference(
    base: Path, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = {"lora": {"rank": 4, "dropout": 0.1}, "optim__name": "adamw", "optim__lr": 3e-3}
    settings |= {"training__steps": 30, "training__log_every": 1}
    result = do(recipe(base, run, corpus / "pairs.jsonl", **settings), Told())
    assert result.adapter == run / "adapter" and not (run / "model").exists()
    first = metrics(run, "validation")[0]
    assert first["step"] == 0 and first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    curve = losses(run)
    assert curve[0] == pytest.approx(math.log(2), rel=1e-6)
    assert curve[-1] < 0.65


def test_a_run_does_not_go_on_when_its_start_has_changed(
    base: Path, corpus: Path, tmp_path: Path
) -> None:
    own, run = tmp_path / "own", tmp_path / "run"
    settings = {"data__sources": [str(corpus / "text.jsonl")], "data__store": str(tmp_path / "s")}
    settings |= {"model__init": str(base), "training__steps": 1}
    run_stage(nano_recipe("pretrain", own, **settings), reporter=Told())
    started = recipe(own, run, corpus / "pairs.jsonl")
    do(started, Told())
    (run / "summary.json").unlink()  # as if it had been stopped
    run_stage(nano_recipe("pretrain", own, **settings, seed=3), reporter=Told(), fresh=True)
    with pytest.raises(CheckpointError, match="is not the base model that this run began with"):
        do(started, Told())


def test_conversations_are_refused_and_pairs_without_answers_left_out(
    base: Path, corpus: Path, tmp_path: Path
) -> None:
    """Rows 8 and 11: bad lines are put aside, what teaches nothing is counted, nothing is NaN."""
    with pytest.raises(DataError, match=r"no preference pairs found .*chosen and rejected"):
        do(recipe(base, tmp_path / "no", corpus / "chat.jsonl"), Told())
    asked = "长江" * 60  # fills the window
    same = {"prompt": "长江？", "chosen": "很长。", "rejected": "很长。"}
    with (tmp_path / "pairs.jsonl").open("w", encoding="utf-8") as stream:
        for line in (corpus / "pairs.jsonl").read_text("utf-8").splitlines():
            stream.write(line + "\n")
        stream.write(json.dumps({"prompt": asked, "chosen": "是。", "rejected": "不。"}) + "\n")
        stream.write(json.dumps(same) + "\n")
        stream.write('{"prompt": "长江？", "chosen": "很长。"\n')
        stream.write('{"prompt": "长江？", "chosen": "", "rejected": "不。"}\n')
    told, run = Told(), tmp_path / "run"
    settings = {"data__validation_fraction": 0.0, "training__steps": 60}
    do(recipe(base, run, tmp_path / "pairs.jsonl", **settings), told)
    said = "\n".join(told.lines)
    assert "invalid records: 2, see" in said
    assert "202 pairs in" in said
    assert "1 left out because they have no supervised tokens, 1 because" in said
    assert all(math.isfinite(loss) for loss in losses(run))
    assert all(line["num_label_tokens"] > 0 for line in metrics(run, "train"))
