import json
import math
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from minimind.config import load_recipe
from minimind.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MinimindError,
    TokenizerError,
)
from minimind.model import Transformer
from minimind.planning import plan as planning
from minimind.tokenizer import Tokenizer, train_tokenizer
from minimind.training import stage
from minimind.training.reporter import pluralize
from minimind.training.stage import prepare_stage
from tests.support.small_runs import RecordingReporter, losses, metrics, steps_done
from tests.support.stages import MakeRecipe, refused, train


def test_a_stage_writes_everything_into_its_run_directory(recipe: MakeRecipe, run: Path) -> None:
    reporter = RecordingReporter()

    def generate(model: Transformer, tokenizer: Tokenizer) -> list[dict[str, str]]:
        return [{"prompt": "长江", "text": str(tokenizer.vocab_size)}]

    result = train(recipe(), reporter, generate_samples=generate)
    assert (result.run, result.model) == (run, run / "model")
    assert load_recipe(run / "recipe.toml").recipe == recipe()
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    assert summary == result.summary
    assert (summary["objective"], summary["steps"], summary["tokens"]) == ("pretrain", 5, 640)
    assert (summary["device"], summary["precision"]) == ("cpu", "fp32")
    weights = load_file(run / "model" / "model.safetensors")
    assert summary["parameters"] == sum(tensor.numel() for tensor in weights.values())
    [validation] = metrics(run, "validation")
    assert summary["bits_per_byte"] == validation["bits_per_byte"]
    assert (summary["best_step"], summary["best_bits_per_byte"]) == (5, summary["bits_per_byte"])
    assert 0 < summary["unigram_bits_per_byte"] < 8
    assert metrics(run, "sample") == [
        {"kind": "sample", "step": 5, "prompt": "长江", "text": "600"}
    ]
    assert (run / "model" / "config.json").is_file()
    assert Tokenizer.load(run / "model").vocab_size == 600
    assert any("5 steps of 4 sequences" in line for line in reporter.lines)
    assert not reporter.open


def test_counts_of_one_are_singular(recipe: MakeRecipe) -> None:
    reporter = RecordingReporter()
    train(
        recipe(training__steps=1, training__global_batch_size=1, training__micro_batch_size=1),
        reporter,
    )
    assert any(line.endswith("; 1 step of 1 sequence") for line in reporter.lines), reporter.lines
    assert [pluralize(n, "step") for n in (0, 1, 2000)] == ["0 steps", "1 step", "2,000 steps"]


def test_sft_starts_from_the_model_of_a_run(recipe: MakeRecipe, run: Path, tmp_path: Path) -> None:
    train(recipe(optim__lr=0.01, training__steps=20))
    reporter = RecordingReporter()
    tuned = tmp_path / "tuned"
    result = train(recipe("sft", tuned, model__init=str(run), optim__lr=1e-4), reporter)
    assert result.model == tuned / "model"
    assert losses(tuned)[0] < math.log(600) - 0.2, "the base model was trained"
    [line] = [line for line in reporter.lines if "conversations" in line]
    assert "0 left out because they have no supervised tokens" in line
    assert Tokenizer.load(tuned / "model").sha256 == Tokenizer.load(run / "model").sha256


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_free_memory_is_measured_before_the_model_is_loaded(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """The footprint contains the weights, which must not be counted twice."""
    module: Any = {"train": stage, "plan": planning}[verb]
    events: list[str] = []

    def recorded(real: Any, *arguments: Any, **options: Any) -> Any:
        events.append(real.__name__)
        return real(*arguments, **options)

    builder = {"train": "build_tokenizer_and_model", "plan": "build_model"}[verb]
    for name in ("free_bytes", builder):
        monkeypatch.setattr(module, name, partial(recorded, getattr(module, name)))
    if verb == "train":
        prepare_stage(recipe(), reporter=RecordingReporter())
    else:
        planning.make_plan(recipe(), seconds=0)
    assert events == ["free_bytes", builder]


def test_epochs_determine_the_number_of_steps(recipe: MakeRecipe) -> None:
    prepared = prepare_stage(
        recipe(training__steps=None, training__epochs=1.5), reporter=RecordingReporter()
    )
    trainer = prepared.trainer
    assert trainer.num_steps == math.ceil(1.5 * trainer.data.order.epoch_size / 4) > 20


def test_a_finished_run_is_not_repeated(recipe: MakeRecipe, run: Path, corpus: Path) -> None:
    first = train(recipe())
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    reporter = RecordingReporter()
    again = train(recipe(), reporter)
    assert again == replace(first, trained=False)
    assert reporter.lines == [f"{run} is already finished, after 5 steps; nothing was trained"]
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert after == before


def test_the_recorded_recipe_reruns_the_run(recipe: MakeRecipe, run: Path) -> None:
    first = train(recipe())
    assert train(load_recipe(run / "recipe.toml").recipe).summary == first.summary


def test_a_run_of_another_recipe_is_kept_and_the_error_names_the_difference(
    recipe: MakeRecipe, run: Path
) -> None:
    train(recipe())
    weights = (run / "model" / "model.safetensors").read_bytes()
    message = refused(recipe(optim__lr=0.5, training__steps=9), ConfigError)
    assert message.startswith(f"{run} holds a run of another recipe: ")
    assert "optim.lr was 0.001 and is now 0.5" in message
    assert "training.steps was 5 and is now 9" in message
    assert message.count(" is now ") == 2
    assert "--fresh" in message
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    assert steps_done(run) == 5


def test_fresh_removes_only_the_files_of_the_run(recipe: MakeRecipe, run: Path) -> None:
    train(recipe())
    (run / "notes.txt").write_text("mine")
    (run / "tensorboard").mkdir()
    result = train(recipe(training__steps=3), fresh=True)
    assert result.summary["steps"] == 3
    assert [line["step"] for line in metrics(run, "train")] == [1, 2, 3]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    assert (run / "notes.txt").read_text() == "mine"
    assert not (run / "tensorboard").exists()


def test_a_run_without_checkpoints_may_change_its_recipe(
    recipe: MakeRecipe, run: Path, tmp_path: Path
) -> None:
    """For example after a typing error in a path."""
    refused(recipe(data__sources=[str(tmp_path / "gone.jsonl")]), DataError)
    assert train(recipe()).summary["steps"] == 5
    assert load_recipe(run / "recipe.toml").recipe == recipe()


def test_a_run_may_be_moved_or_named_by_another_path(
    recipe: MakeRecipe, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(recipe())
    monkeypatch.chdir(tmp_path)
    assert train(recipe(out=Path("run"))).summary == first.summary
    run.rename(tmp_path / "moved")
    assert train(recipe(out=tmp_path / "moved")).summary == first.summary


@pytest.mark.parametrize("needed", ["run", "run/model"])
def test_fresh_does_not_remove_the_model_that_the_run_starts_from(
    recipe: MakeRecipe, run: Path, tmp_path: Path, needed: str
) -> None:
    train(recipe())
    weights = (run / "model" / "model.safetensors").read_bytes()
    tuned = recipe("sft", run, model__init=str(tmp_path / needed))
    assert "would be removed by --fresh" in refused(tuned, ConfigError, fresh=True)
    assert (run / "model" / "model.safetensors").read_bytes() == weights


def test_folders_that_no_run_has_made_are_kept(recipe: MakeRecipe, run: Path) -> None:
    """For example a downloaded model in the place where the run would write its own."""
    train(recipe())
    run.rename(run.with_name("base"))
    for name in ("model", "checkpoints"):
        (run / name).mkdir(parents=True)
        (run / name / "config.json").write_text("{}")
        for settings in ({}, {"model__init": str(run.with_name("base"))}):
            for fresh in (True, False) if name == "model" else (True,):
                message = refused(recipe(**settings), ConfigError, fresh=fresh)
                assert message == (
                    f"{run / name} exists, but {run} has no recipe.toml: no training run has made "
                    "it, or its recipe was removed. Choose another --out"
                )
        assert (run / name / "config.json").read_text() == "{}"
        shutil.rmtree(run)


def test_a_removed_model_is_written_again(recipe: MakeRecipe, run: Path) -> None:
    train(recipe())
    weights = (run / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "model")
    assert train(recipe()).model == run / "model"
    assert (run / "model" / "model.safetensors").read_bytes() == weights


def test_a_run_does_not_resume_with_other_data(
    recipe: MakeRecipe, run: Path, corpus: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.jsonl"
    shutil.copy(corpus / "text.jsonl", own)
    settings = {"data__sources": [str(own)]}
    train(recipe(**settings))
    (run / "summary.json").unlink()  # as if the run had been stopped
    content = own.read_bytes()
    own.write_bytes(content + b'{"text": "more"}\n')
    message = refused(recipe(**settings), CheckpointError)
    assert message.startswith(f"{run}: the data or the tokenizer has changed since this run")
    own.write_bytes(content)  # the same bytes at another time
    assert train(recipe(**settings)).summary["steps"] == 5


def test_a_run_does_not_resume_with_another_tokenizer(
    recipe: MakeRecipe, run: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    for size in (280, 290):
        train_tokenizer(["长江很长。"] * 10, vocab_size=size).save(own)
        if size == 280:
            train(recipe(tokenizer=str(own)))
            (run / "summary.json").unlink()
    refused(recipe(tokenizer=str(own)), CheckpointError)


def test_a_run_with_only_damaged_checkpoints_needs_fresh(recipe: MakeRecipe, run: Path) -> None:
    train(recipe())
    (run / "summary.json").unlink()
    (run / "checkpoints" / "step-00000005" / "state.json").write_text("{}")
    assert "--fresh" in refused(recipe(), CheckpointError)
    assert train(recipe(), fresh=True).summary["steps"] == 5


def test_a_run_directory_is_required(recipe: MakeRecipe) -> None:
    nowhere = recipe().model_copy(update={"out": None})
    assert "--out DIR" in refused(nowhere, ConfigError)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"data__sources": ["gone.jsonl"]}, DataError),
        ({"tokenizer": "gone"}, TokenizerError),
        ({"tokenizer": None}, ConfigError),
        ({"data__seq_len": 100_000}, ConfigError),
        ({"training__trackers": ["swanlab"]}, ConfigError),
    ],
)
def test_a_refused_run_leaves_nothing_behind(
    recipe: MakeRecipe,
    run: Path,
    wrong: dict[str, Any],
    error: type[MinimindError],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "swanlab", None)  # as if it were not installed
    refused(recipe(out=run / "new" / "run", **wrong), error)
    assert not run.exists()
    run.mkdir()
    refused(recipe(**wrong), error)
    assert list(run.iterdir()) == []


def test_a_refused_fresh_start_keeps_the_earlier_run(recipe: MakeRecipe, run: Path) -> None:
    first = train(recipe())
    names = sorted(path.name for path in run.iterdir())
    refused(recipe(data__sources=["gone.jsonl"]), DataError, fresh=True)
    assert sorted(path.name for path in run.iterdir()) == names
    assert train(recipe()) == replace(first, trained=False)


def test_preparing_a_stage_writes_nothing_into_the_run_directory(
    recipe: MakeRecipe, run: Path
) -> None:
    reporter = RecordingReporter()
    prepare_stage(recipe(), reporter=reporter)
    assert not run.exists()
    assert not reporter.open
