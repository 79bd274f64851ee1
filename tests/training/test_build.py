"""One builder for training, planning and extracting: they refuse the same, and read the same."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind.config.settings import Recipe
from minimind.errors import CheckpointError, ConfigError, MinimindError, ModelError
from minimind.model import load_model, save_model
from minimind.planning.plan import make_plan
from minimind.tokenizer import Tokenizer, train_tokenizer
from minimind.training.stage import extract_checkpoint, prepare_stage
from tests.support.small_runs import RecordingReporter, lora_settings
from tests.support.stages import Make, do, refused


@pytest.fixture
def base(recipe: Make, tmp_path: Path) -> Path:
    """The run of a base model of one step."""
    do(recipe(out=tmp_path / "base", training__steps=1))
    return tmp_path / "base"


def plan(recipe: Recipe) -> object:
    return make_plan(recipe, seconds=0)


def train(recipe: Recipe) -> object:
    return prepare_stage(recipe, reporter=RecordingReporter())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "muon": ({"optim__name": "muon"}, 'set optim.name = "adamw"'),
    "no model": ({"model__init": None}, "give --model MODEL"),
    "context": ({"model__context": 1024}, "does not remember model.context=1024"),
    "window": ({"data__seq_len": 300}, "stretch the model first"),
    "target": ({"lora__targets": ["mpl"]}, "did you mean mlp"),
    "gone": ({"model__init": "nowhere"}, "nowhere: there is no such directory"),
    "deepspeed": ({"training__backend": "deepspeed"}, "deepspeed"),
}


@pytest.mark.parametrize("verb", [plan, train])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_refused_by_plan_and_training(
    recipe: Make, base: Path, verb: Callable[[Recipe], object], case: str
) -> None:
    changed, message = REFUSED[case]
    settings = lora_settings(model__init=str(base)) | changed
    if not settings["model__init"]:
        settings["tokenizer"] = str(base / "model")
    with pytest.raises((ConfigError, ModelError)) as caught:
        verb(recipe("sft", **settings))
    assert message in str(caught.value)


@pytest.mark.parametrize("verb", [plan, train])
def test_a_tokenizer_that_does_not_fit_is_refused_by_plan_and_training(
    recipe: Make, base: Path, tmp_path: Path, verb: Callable[[Recipe], object]
) -> None:
    train_tokenizer(["长江很长。Rivers are long." * 20] * 50, vocab_size=650).save(tmp_path / "own")
    many = tmp_path / "own"
    size = Tokenizer.load(many).vocab_size
    model = load_model(base / "model")
    if size <= model.config.vocab_size:  # the texts hold fewer tokens than were asked for
        model.config = model.config.model_copy(update={"vocab_size": size - 1})
        cut = model.model.embed_tokens.weight[: size - 1].clone()
        model.model.embed_tokens.weight = torch.nn.Parameter(cut)
        small = Tokenizer.load(base / "model")
        save_model(tmp_path / "small", model, small)
        base = tmp_path / "small"
    with pytest.raises(MinimindError) as caught:
        verb(recipe("sft", model__init=str(base), tokenizer=str(many)))
    assert str(many) in str(caught.value)


# What became of the base model.


def remake(base: Path, change: str) -> None:
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


def stopped(recipe: Recipe) -> None:
    """Train, and forget that the run was finished."""
    do(recipe)
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
def test_another_base_model_is_an_error_where_the_run_needs_it(
    recipe: Make, base: Path, run: Path, tmp_path: Path, kind: str, change: str
) -> None:
    objective, settings = SETTINGS[kind]
    started = recipe(objective, model__init=str(base), **settings)
    stopped(started)
    remake(base, change)
    message = refused(started, CheckpointError)
    wrong = (
        f"{base}: there is no such directory" if change == "gone" else f"{base} is not the model"
    )
    assert message.startswith(str(run)) and wrong in message
    assert message.endswith("Put it back, choose another --out, or start over with --fresh")
    with pytest.raises(CheckpointError) as caught:
        extract_checkpoint(run, 5, tmp_path / "out")
    assert wrong in str(caught.value)


@pytest.mark.parametrize("change", ["weights", "shape", "gone"])
@pytest.mark.parametrize("context", [None, 1024])
def test_a_full_fine_tune_needs_no_base_model(
    recipe: Make, base: Path, run: Path, tmp_path: Path, change: str, context: int | None
) -> None:
    settings = {"training__steps": 6, "checkpoint__every": 3, "model__context": context}
    started = recipe("sft", model__init=str(base), **settings)
    stopped(started)
    shutil.copytree(run / "checkpoints" / "step-00000006", tmp_path / "whole")
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    remake(base, change)
    assert extract_checkpoint(run, 3, tmp_path / "out") == 3
    assert load_model(tmp_path / "out").config.max_position_embeddings == (context or 256)
    assert Tokenizer.load(tmp_path / "out").vocab_size == 600
    assert do(started).summary["steps"] == 6
    for name in ("model", "optimizer"):
        again = run / "checkpoints" / "step-00000006" / f"{name}.safetensors"
        assert again.read_bytes() == (tmp_path / "whole" / again.name).read_bytes()


def test_a_pretraining_run_resumes_when_its_tokenizer_was_removed(
    recipe: Make, run: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(tokenizer_dir, tmp_path / "own")
    started = recipe(tokenizer=str(own))
    stopped(started)
    shutil.rmtree(own)
    assert do(started).summary["steps"] == 5
    assert extract_checkpoint(run, 5, tmp_path / "out") == 5
