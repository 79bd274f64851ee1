import json
import math
import shutil
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
    ModelError,
    TokenizerError,
)
from minimind.model import Transformer, read_config
from minimind.model.rope import BEST_SCALING
from minimind.planning import plan as planning
from minimind.tokenizer import Tokenizer, train_tokenizer
from minimind.training import stage
from minimind.training.reporter import pluralize
from minimind.training.stage import extract_checkpoint, prepare_stage
from tests.support.small_runs import RecordingReporter, lora_settings, losses, metrics, steps_done
from tests.support.stages import Make, do, refused


def test_a_stage_leaves_everything_in_its_directory(recipe: Make, run: Path) -> None:
    told = RecordingReporter()

    def write(model: Transformer, tokenizer: Tokenizer) -> list[dict[str, str]]:
        return [{"prompt": "长江", "text": str(tokenizer.vocab_size)}]

    result = do(recipe(), told, write_samples=write)
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
    assert any("5 steps of 4 sequences" in line for line in told.lines)
    assert not told.open


def test_one_is_not_told_as_many(recipe: Make) -> None:
    told = RecordingReporter()
    do(recipe(training__steps=1, training__global_batch_size=1, training__micro_batch_size=1), told)
    assert any(line.endswith("; 1 step of 1 sequence") for line in told.lines), told.lines
    assert [pluralize(n, "window") for n in (0, 1, 2000)] == [
        "0 windows",
        "1 window",
        "2,000 windows",
    ]


def test_sft_starts_from_the_model_of_a_run(recipe: Make, run: Path, tmp_path: Path) -> None:
    do(recipe(optim__lr=0.01, training__steps=20))
    told = RecordingReporter()
    tuned = tmp_path / "tuned"
    result = do(recipe("sft", tuned, model__init=str(run), optim__lr=1e-4), told)
    assert result.model == tuned / "model"
    assert losses(tuned)[0] < math.log(600) - 0.2, "it has learned something before"
    [line] = [line for line in told.lines if "conversations" in line]
    assert "0 left out because no answer was left" in line
    assert Tokenizer.load(tuned / "model").sha256 == Tokenizer.load(run / "model").sha256


@pytest.mark.parametrize("kind", ["pretrain", "lora", "dpo"])
def test_a_checkpoint_becomes_a_model_or_an_adapter(
    recipe: Make, run: Path, corpus: Path, tmp_path: Path, kind: str
) -> None:
    do(recipe())
    settings: dict[str, Any] = {"checkpoint__every": 1, "checkpoint__keep": 9}
    if kind != "pretrain":
        settings["model__init"] = str(run)
    if kind == "lora":
        settings |= lora_settings()
    if kind == "dpo":
        settings |= {"data__sources": [str(corpus / "pairs.jsonl")], "data__seq_len": 64}
    again = tmp_path / "again"
    result = do(recipe("sft" if kind == "lora" else kind, again, **settings))
    made, weights = result.model or result.adapter, []
    assert made and result.summary["best_step"] == 5
    for step in (None, 5, 2):
        out = tmp_path / f"{step}"
        assert extract_checkpoint(again, step, out) == (step or 5)
        files = files_in(out)
        assert files.keys() == {path.name for path in made.iterdir()}
        weights.append(next(files[name] for name in files if name.endswith("model.safetensors")))
    assert weights[0] == weights[1] == (made / next(iter(made.glob("*.safetensors")))).read_bytes()
    assert weights[2] != weights[0]
    before = files_in(out)
    recipe_file = again / "recipe.toml"
    for there in (out, made, recipe_file):
        with pytest.raises(ModelError, match=r"is there already .* another --out, or remove it"):
            extract_checkpoint(again, 5, there)
    assert files_in(out) == before and recipe_file.is_file()
    out = tmp_path / "empty"
    out.mkdir()
    (out / ".DS_Store").touch()
    assert extract_checkpoint(again, 2, out) == 2 and files_in(out) == before


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_checkpoint_that_is_not_there_or_damaged_becomes_nothing(
    recipe: Make, run: Path, tmp_path: Path
) -> None:
    do(recipe(data__validation_fraction=0.0))
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; kept are 5"):
        extract_checkpoint(run, 3, out)
    with pytest.raises(CheckpointError, match="nothing tells which checkpoint is the best"):
        extract_checkpoint(run, None, out)
    weights = run / "checkpoints" / "step-00000005" / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(CheckpointError, match=r"step-00000005 is damaged: .*model.safetensors"):
        extract_checkpoint(run, 5, out)
    assert not out.exists()


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_free_memory_is_measured_before_the_weights_are_there(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """The footprint counts the weights: what is free must not lack them a second time."""
    module: Any = {"train": stage, "plan": planning}[verb]
    events: list[str] = []

    def recorded(real: Any, *arguments: Any, **options: Any) -> Any:
        events.append(real.__name__)
        return real(*arguments, **options)

    for name in ("free_bytes", "build_model"):
        monkeypatch.setattr(module, name, partial(recorded, getattr(module, name)))
    if verb == "train":
        prepare_stage(recipe(), reporter=RecordingReporter())
    else:
        planning.make_plan(recipe(), seconds=0)
    assert events == ["free_bytes", "build_model"]


def test_the_baseline_counts_a_source_as_often_as_an_epoch_sees_it(
    recipe: Make, corpus: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "zzzz qqqq zzzz qqqq. "}\n' * 400, encoding="utf-8")
    texts = str(corpus / "text.jsonl")

    def baseline(name: str, *sources: str) -> float:
        settings = {"data__sources": list(sources), "data__validation": [texts]}
        result = do(recipe(out=tmp_path / name, **settings, training__steps=1))
        return float(result.summary["unigram_bits_per_byte"])

    equal, rare = baseline("equal", texts, str(other)), baseline("rare", texts, f"{other}@0.01")
    assert rare < equal - 0.05, "the held-out text is like the first source"
    assert rare == pytest.approx(baseline("none", texts), rel=0.01)


def test_epochs_give_the_number_of_steps(recipe: Make) -> None:
    prepared = prepare_stage(
        recipe(training__steps=None, training__epochs=1.5), reporter=RecordingReporter()
    )
    trainer = prepared.trainer
    assert trainer.num_steps == math.ceil(1.5 * trainer.data.order.epoch_size / 4) > 20


def test_held_out_data_of_its_own(recipe: Make, corpus: Path) -> None:
    own = recipe(data__validation=[str(corpus / "text.jsonl")], data__validation_fraction=0.5)
    trainer = prepare_stage(own, reporter=RecordingReporter()).trainer
    assert trainer.held_out is not None
    assert trainer.held_out.order.epoch_size == trainer.data.order.epoch_size, (
        "nothing is held out twice"
    )


def test_without_enough_to_hold_out_it_says_so(recipe: Make) -> None:
    told = RecordingReporter()
    trainer = prepare_stage(recipe(data__validation_fraction=0.0), reporter=told).trainer
    assert trainer.held_out is None
    assert any("too little text is held out" in line for line in told.lines)


def test_a_finished_run_is_found_done(recipe: Make, run: Path, corpus: Path) -> None:
    first = do(recipe())
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    told = RecordingReporter()
    again = do(recipe(), told)
    assert again == first
    assert told.lines == []
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert after == before


def test_its_own_recipe_reruns_it(recipe: Make, run: Path) -> None:
    first = do(recipe())
    assert do(load_recipe(run / "recipe.toml").recipe) == first


def test_a_run_of_another_recipe_stays_and_the_difference_is_named(recipe: Make, run: Path) -> None:
    do(recipe())
    weights = (run / "model" / "model.safetensors").read_bytes()
    message = refused(recipe(optim__lr=0.5, training__steps=9), ConfigError)
    assert message.startswith(f"{run} holds a run of another recipe: ")
    assert "optim.lr was 0.001 and is now 0.5" in message
    assert "training.steps was 5 and is now 9" in message
    assert message.count(" is now ") == 2
    assert "--fresh" in message
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    assert steps_done(run) == 5


def test_fresh_starts_over_and_leaves_what_is_not_of_a_run(recipe: Make, run: Path) -> None:
    do(recipe())
    (run / "notes.txt").write_text("mine")
    (run / "tensorboard").mkdir()
    result = do(recipe(training__steps=3), fresh=True)
    assert result.summary["steps"] == 3
    assert [line["step"] for line in metrics(run, "train")] == [1, 2, 3]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    assert (run / "notes.txt").read_text() == "mine"
    assert not (run / "tensorboard").exists()


def test_a_run_that_saved_nothing_has_no_recipe_to_keep_to(
    recipe: Make, run: Path, tmp_path: Path
) -> None:
    """Such as one whose data was mistyped."""
    refused(recipe(data__sources=[str(tmp_path / "gone.jsonl")]), DataError)
    assert do(recipe()).summary["steps"] == 5
    assert load_recipe(run / "recipe.toml").recipe == recipe()


def test_a_run_that_was_moved_or_is_called_by_another_path_is_the_same(
    recipe: Make, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = do(recipe())
    monkeypatch.chdir(tmp_path)
    assert do(recipe(out=Path("run"))).summary == first.summary
    run.rename(tmp_path / "moved")
    assert do(recipe(out=tmp_path / "moved")).summary == first.summary


@pytest.mark.parametrize("needed", ["run", "run/model"])
def test_fresh_does_not_remove_what_the_run_starts_from(
    recipe: Make, run: Path, tmp_path: Path, needed: str
) -> None:
    do(recipe())
    weights = (run / "model" / "model.safetensors").read_bytes()
    tuned = recipe("sft", run, model__init=str(tmp_path / needed))
    assert "would be removed by --fresh" in refused(tuned, ConfigError, fresh=True)
    assert (run / "model" / "model.safetensors").read_bytes() == weights


def test_a_model_that_was_removed_is_written_again(recipe: Make, run: Path) -> None:
    do(recipe())
    weights = (run / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "model")
    assert do(recipe()).model == run / "model"
    assert (run / "model" / "model.safetensors").read_bytes() == weights


def test_a_run_does_not_go_on_with_other_data(
    recipe: Make, run: Path, corpus: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.jsonl"
    shutil.copy(corpus / "text.jsonl", own)
    settings = {"data__sources": [str(own)]}
    do(recipe(**settings))
    (run / "summary.json").unlink()  # as if it had been stopped
    content = own.read_bytes()
    own.write_bytes(content + b'{"text": "more"}\n')
    message = refused(recipe(**settings), CheckpointError)
    assert message.startswith(f"{run}: the data or the tokenizer has changed since this run")
    own.write_bytes(content)  # the same bytes at another time
    assert do(recipe(**settings)).summary["steps"] == 5


def test_a_run_does_not_go_on_with_another_tokenizer(
    recipe: Make, run: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    for size in (280, 290):
        train_tokenizer(["长江很长。"] * 10, vocab_size=size).save(own)
        if size == 280:
            do(recipe(tokenizer=str(own)))
            (run / "summary.json").unlink()
    refused(recipe(tokenizer=str(own)), CheckpointError)


def test_a_run_whose_checkpoints_are_all_damaged_stops(recipe: Make, run: Path) -> None:
    do(recipe())
    (run / "summary.json").unlink()
    (run / "checkpoints" / "step-00000005" / "state.json").write_text("{}")
    assert "--fresh" in refused(recipe(), CheckpointError)
    assert do(recipe(), fresh=True).summary["steps"] == 5


def test_too_little_text(recipe: Make, tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "长江很长。"}\n', encoding="utf-8")
    message = refused(recipe(data__sources=[str(short)]), DataError)
    assert message == (
        "the data gives not one window of 32 tokens; use more text, or a smaller data.seq_len"
    )


def test_no_data_and_data_that_is_not_there(recipe: Make, tmp_path: Path) -> None:
    assert "data.sources is empty: give --data FILE" in refused(
        recipe(data__sources=[]), ConfigError
    )
    gone = str(tmp_path / "gone.jsonl")
    assert gone in refused(recipe(out=tmp_path / "other", data__sources=[gone]), DataError)


def test_a_window_longer_than_the_context(recipe: Make) -> None:
    message = refused(recipe(data__seq_len=300), ConfigError)
    assert message.startswith("data.seq_len (300) is longer than the model's context (256)")


def test_a_model_is_tuned_at_a_longer_context(recipe: Make, run: Path, tmp_path: Path) -> None:
    do(recipe())
    settings = {"model__init": str(run), "data__seq_len": 300}
    message = refused(recipe("sft", tmp_path / "refused", **settings), ConfigError)
    assert message.endswith("lower it, or raise model.context")
    longer = recipe("sft", tmp_path / "tuned", **settings, model__context=1024)
    model = do(longer).model
    assert model is not None
    config = read_config(model)
    assert config.max_position_embeddings == 1024
    assert config.rope_scaling is not None
    assert (config.rope_scaling.rope_type, config.rope_scaling.factor) == (BEST_SCALING, 4)
    again = {"model__init": str(model), "model__context": 1024, "model__rope_scaling": "linear"}
    tuned = do(recipe("sft", tmp_path / "again", **again)).model
    assert tuned is not None
    assert read_config(tuned) == config  # nothing to stretch
    again["model__context"] = 256
    message = refused(recipe("sft", tmp_path / "shorter", **again), ConfigError)
    assert "model.context=256 is within what the model reads as it is, 1024 tokens" in message
    again["model__context"] = 2048
    message = refused(recipe("sft", tmp_path / "twice", **again), ModelError)
    assert "stretched already" in message


def test_a_new_model_needs_a_tokenizer(recipe: Make) -> None:
    message = refused(recipe(tokenizer=None), ConfigError)
    assert "minimind tokenizer train" in message and "--tokenizer DIR" in message


def test_a_tokenizer_that_is_not_there(recipe: Make, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    assert gone in refused(recipe(tokenizer=gone), TokenizerError)


def test_a_tokenizer_of_another_model(recipe: Make, run: Path, tmp_path: Path) -> None:
    do(recipe())
    train_tokenizer(["长江很长。"] * 10, vocab_size=280).save(tmp_path / "small")
    settings = {"model__init": str(run), "tokenizer": str(tmp_path / "small")}
    message = refused(recipe("sft", tmp_path / "tuned", **settings), TokenizerError)
    assert f"{tmp_path / 'small'}: its tokenizer.json has 280 words and its model 600" in message


def test_a_model_that_is_not_there_yet(recipe: Make, run: Path, tmp_path: Path) -> None:
    tuned = recipe("sft", tmp_path / "tuned", model__init=str(run))
    assert "there is no such directory" in refused(tuned, ModelError)
    (run / "checkpoints").mkdir(parents=True)
    assert "has not finished" in refused(tuned, ModelError)


def test_a_run_needs_a_directory(recipe: Make) -> None:
    nowhere = recipe().model_copy(update={"out": None})
    assert "--out DIR" in refused(nowhere, ConfigError)


def test_preparing_writes_nothing_into_the_run(recipe: Make, run: Path) -> None:
    told = RecordingReporter()
    prepare_stage(recipe(), reporter=told)
    assert not run.exists()
    assert not told.open
