"""Training, planning and extracting build by the same functions and refuse the same recipes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind.config.settings import Recipe
from minimind.errors import CheckpointError, ConfigError, MinimindError, ModelError, TokenizerError
from minimind.model import load_model, read_config, save_model
from minimind.model.rope import BEST_SCALING
from minimind.planning.plan import make_plan
from minimind.tokenizer import Tokenizer, train_tokenizer
from minimind.training.extract import extract_checkpoint
from minimind.training.stage import prepare_stage
from tests.support.small_runs import RecordingReporter, lora_settings
from tests.support.stages import MakeRecipe, refused, train


@pytest.fixture
def base(recipe: MakeRecipe, tmp_path: Path) -> Path:
    """Train a base model for one step and return its run directory."""
    train(recipe(out=tmp_path / "base", training__steps=1))
    return tmp_path / "base"


def plan(recipe: Recipe) -> object:
    return make_plan(recipe, seconds=0)


def prepare(recipe: Recipe) -> object:
    return prepare_stage(recipe, reporter=RecordingReporter())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "muon": ({"optim__name": "muon"}, 'set optim.name = "adamw"'),
    "no model": ({"model__init": None}, "give --model MODEL"),
    "context": ({"model__context": 1024}, "does not store model.context=1024"),
    "seq_len": ({"data__seq_len": 300}, "extend the context first"),
    "target": ({"lora__targets": ["mpl"]}, "did you mean mlp"),
    "gone": ({"model__init": "nowhere"}, "nowhere: there is no such directory"),
    "deepspeed": ({"training__backend": "deepspeed"}, "deepspeed"),
}


@pytest.mark.parametrize("build", [plan, prepare])
@pytest.mark.parametrize("case", REFUSED)
def test_plan_and_training_refuse_the_same_recipes(
    recipe: MakeRecipe, base: Path, build: Callable[[Recipe], object], case: str
) -> None:
    changed, message = REFUSED[case]
    settings = lora_settings(model__init=str(base)) | changed
    if not settings["model__init"]:
        settings["tokenizer"] = str(base / "model")
    with pytest.raises((ConfigError, ModelError)) as caught:
        build(recipe("sft", **settings))
    assert message in str(caught.value)


@pytest.mark.parametrize("build", [plan, prepare])
def test_plan_and_training_refuse_a_tokenizer_that_does_not_fit(
    recipe: MakeRecipe, base: Path, tmp_path: Path, build: Callable[[Recipe], object]
) -> None:
    train_tokenizer(["长江很长。Rivers are long." * 20] * 50, vocab_size=650).save(tmp_path / "own")
    large = tmp_path / "own"
    size = Tokenizer.load(large).vocab_size
    model = load_model(base / "model")
    if size <= model.config.vocab_size:  # the texts give fewer tokens than requested
        model.config = model.config.model_copy(update={"vocab_size": size - 1})
        truncated = model.model.embed_tokens.weight[: size - 1].clone()
        model.model.embed_tokens.weight = torch.nn.Parameter(truncated)
        small = Tokenizer.load(base / "model")
        save_model(tmp_path / "small", model, small)
        base = tmp_path / "small"
    with pytest.raises(MinimindError) as caught:
        build(recipe("sft", model__init=str(base), tokenizer=str(large)))
    assert str(large) in str(caught.value)


def test_a_sequence_longer_than_the_context_is_refused(recipe: MakeRecipe) -> None:
    message = refused(recipe(data__seq_len=300), ConfigError)
    assert message.startswith("data.seq_len (300) is longer than the model's context (256)")
    assert message.endswith("lower it, or raise model.max_position_embeddings")


def test_a_model_is_fine_tuned_at_an_extended_context(
    recipe: MakeRecipe, run: Path, tmp_path: Path
) -> None:
    train(recipe())
    settings = {"model__init": str(run), "data__seq_len": 300}
    message = refused(recipe("sft", tmp_path / "refused", **settings), ConfigError)
    assert message.endswith("lower it, or raise model.context")
    longer = recipe("sft", tmp_path / "tuned", **settings, model__context=1024)
    model = train(longer).model
    assert model is not None
    config = read_config(model)
    assert config.max_position_embeddings == 1024
    assert config.rope_scaling is not None
    assert (config.rope_scaling.rope_type, config.rope_scaling.factor) == (BEST_SCALING, 4)
    again = {"model__init": str(model), "model__context": 1024, "model__rope_scaling": "linear"}
    tuned = train(recipe("sft", tmp_path / "again", **again)).model
    assert tuned is not None
    assert read_config(tuned) == config  # the context is unchanged
    again["model__context"] = 256
    message = refused(recipe("sft", tmp_path / "shorter", **again), ConfigError)
    assert "model.context=256 is shorter than the model's own context of 1024 tokens" in message
    again["model__context"] = 2048
    message = refused(recipe("sft", tmp_path / "twice", **again), ModelError)
    assert "already extended" in message


def test_a_new_model_needs_a_tokenizer(recipe: MakeRecipe) -> None:
    message = refused(recipe(tokenizer=None), ConfigError)
    assert "minimind tokenizer train" in message and "--tokenizer DIR" in message


def test_a_missing_tokenizer_is_an_error(recipe: MakeRecipe, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    assert gone in refused(recipe(tokenizer=gone), TokenizerError)


def test_a_tokenizer_of_another_model_is_refused(
    recipe: MakeRecipe, run: Path, tmp_path: Path
) -> None:
    train(recipe())
    train_tokenizer(["长江很长。"] * 10, vocab_size=280).save(tmp_path / "small")
    settings = {"model__init": str(run), "tokenizer": str(tmp_path / "small")}
    message = refused(recipe("sft", tmp_path / "tuned", **settings), TokenizerError)
    assert (
        f"{tmp_path / 'small'}: its tokenizer.json has 280 tokens, but its model has 600" in message
    )


def test_a_missing_or_unfinished_model_is_an_error(
    recipe: MakeRecipe, run: Path, tmp_path: Path
) -> None:
    tuned = recipe("sft", tmp_path / "tuned", model__init=str(run))
    assert "there is no such directory" in refused(tuned, ModelError)
    (run / "checkpoints").mkdir(parents=True)
    assert "has not finished" in refused(tuned, ModelError)


# The base model is replaced or removed after the run has begun.


def replace_base(base: Path, change: str) -> None:
    """Give the base model another shape or other weights, or remove it."""
    if change == "gone":
        shutil.rmtree(base)
        return
    model, tokenizer = load_model(base / "model"), Tokenizer.load(base / "model")
    if change == "weights":
        with torch.no_grad():
            model.model.norm.weight.add_(0.001)
    else:
        layers = model.config.num_hidden_layers + 1
        torch.manual_seed(0)
        shape = model.config.model_copy(update={"num_hidden_layers": layers})
        model = type(model)(shape)
    save_model(base / "model", model, tokenizer)


def train_unfinished(recipe: Recipe) -> None:
    """Train, then remove the model and the summary, as if the run had been stopped."""
    train(recipe)
    run = Path(recipe.out or "")
    shutil.rmtree(run / ("adapter" if recipe.lora else "model"))
    (run / "summary.json").unlink()


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("sft", lora_settings()),
    "dpo": ("dpo", {"data__seq_len": 64}),
    "sft": ("sft", {}),
}


@pytest.mark.parametrize("change", ["weights", "shape", "gone"])
@pytest.mark.parametrize("kind", ["lora", "dpo"])
def test_a_changed_base_model_is_an_error_if_the_run_needs_it(
    recipe: MakeRecipe, base: Path, run: Path, tmp_path: Path, kind: str, change: str
) -> None:
    objective, settings = SETTINGS[kind]
    started = recipe(objective, model__init=str(base), **settings)
    train_unfinished(started)
    replace_base(base, change)
    message = refused(started, CheckpointError)
    wrong = (
        f"{base}: there is no such directory"
        if change == "gone"
        else f"{base} is not the base model"
    )
    assert message.startswith(str(run)) and wrong in message
    assert message.endswith("Restore it, choose another --out, or start over with --fresh")
    with pytest.raises(CheckpointError) as caught:
        extract_checkpoint(run, 5, tmp_path / "out")
    assert wrong in str(caught.value)


@pytest.mark.parametrize("change", ["weights", "shape", "gone"])
@pytest.mark.parametrize("context", [None, 1024])
def test_a_full_fine_tune_needs_no_base_model(
    recipe: MakeRecipe, base: Path, run: Path, tmp_path: Path, change: str, context: int | None
) -> None:
    settings = {"training__steps": 6, "checkpoint__every": 3, "model__context": context}
    started = recipe("sft", model__init=str(base), **settings)
    train_unfinished(started)
    shutil.copytree(run / "checkpoints" / "step-00000006", tmp_path / "expected")
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    replace_base(base, change)
    assert extract_checkpoint(run, 3, tmp_path / "out") == 3
    assert load_model(tmp_path / "out").config.max_position_embeddings == (context or 256)
    assert Tokenizer.load(tmp_path / "out").vocab_size == 600
    assert train(started).summary["steps"] == 6
    for name in ("model", "optimizer"):
        again = run / "checkpoints" / "step-00000006" / f"{name}.safetensors"
        assert again.read_bytes() == (tmp_path / "expected" / again.name).read_bytes()


def test_a_pretraining_run_resumes_after_its_tokenizer_was_removed(
    recipe: MakeRecipe, run: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(tokenizer_dir, tmp_path / "own")
    started = recipe(tokenizer=str(own))
    train_unfinished(started)
    shutil.rmtree(own)
    assert train(started).summary["steps"] == 5
    assert extract_checkpoint(run, 5, tmp_path / "out") == 5
