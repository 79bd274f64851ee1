"""LoRA as a stage: what is trained, what is kept, what is made, and what is measured beside."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minimind.config.settings import Recipe
from minimind.errors import CheckpointError, ConfigError, DataError, MinimindError, ModelError
from minimind.inference.load import load_for_inference
from minimind.model import load_model
from minimind.training.stage import StageResult, prepare_stage, run_stage
from tests.support.small_runs import (
    RecordingReporter,
    lora_settings,
    losses,
    metrics,
    nano_recipe,
    nano_trainer,
)


@pytest.fixture(scope="module")
def place(corpus: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, a run of pretraining."""
    folder = tmp_path_factory.mktemp("place")
    settings = {"tokenizer": str(tokenizer_dir), "training__steps": 20}
    sources = [str(corpus / "text.jsonl")]
    recipe = nano_recipe("pretrain", folder / "base", data__sources=sources, **settings)
    run_stage(recipe, reporter=RecordingReporter())
    return folder


@pytest.fixture
def recipe(place: Path, corpus: Path, tmp_path: Path) -> Any:
    """Makes recipes of ten steps of LoRA in `tmp_path / "run"`."""

    def make(objective: str = "sft", **settings: Any) -> Recipe:
        given: dict[str, Any] = {
            "model__init": str(place / "base"),
            "data__sources": [str(corpus / "chat.jsonl")],
            "data__store": str(place / "stores"),
            "data__validation_fraction": 0.1,
            "training__steps": 10,
            "optim__lr": 0.01,
        }
        return nano_recipe(objective, tmp_path / "run", **lora_settings(**given | settings))

    return make


def do(recipe: Recipe, told: RecordingReporter | None = None, **options: Any) -> StageResult:
    return run_stage(recipe, reporter=told or RecordingReporter(), **options)


def refused(recipe: Recipe, error: type[MinimindError]) -> str:
    with pytest.raises(error) as caught:
        do(recipe)
    return str(caught.value)


@pytest.mark.numeric
def test_it_leaves_an_adapter_and_the_base_as_it_was(
    recipe: Any, place: Path, tmp_path: Path
) -> None:
    weights = place / "base" / "model" / "model.safetensors"
    before, told = weights.read_bytes(), RecordingReporter()
    result = do(recipe(), told)
    run = tmp_path / "run"
    assert (result.model, result.adapter, result.finished) == (None, run / "adapter", True)
    assert not (run / "model").exists()
    assert weights.read_bytes() == before
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(bool(t.any()) for name, t in tensors.items() if "lora_B" in name), "all are trained"
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    assert summary == result.summary
    assert summary["trained_parameters"] == sum(t.numel() for t in tensors.values())
    assert summary["parameters"] > summary["trained_parameters"]
    assert summary["base"] == str(place / "base")
    assert any("of them trained" in line for line in told.lines)
    [checkpoint] = (run / "checkpoints").iterdir()
    kept = load_file(checkpoint / "model.safetensors")
    assert {f"base_model.model.{name}.weight" for name in kept} == tensors.keys()
    assert do(recipe()).adapter == result.adapter, "found done"
    assert losses(run)[-1] < losses(run)[0] - 0.2
    merged, _ = load_for_inference(place / "base", "cpu", adapter=run, dtype=torch.float32)
    plain = load_model(place / "base" / "model")
    changed = {
        name.rpartition(".")[0].rpartition(".")[2]
        for name, tensor in merged.state_dict().items()
        if not tensor.equal(plain.state_dict()[name])
    }
    assert changed == {*(f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down"))}


@pytest.mark.parametrize("preset", ["nano", "nano-moe"])
def test_frozen_weights_do_not_change_by_a_bit(tmp_path: Path, preset: str) -> None:
    settings = lora_settings(optim__lr=0.05, model__preset=preset)
    trainer = nano_trainer(tmp_path, "sft", **settings)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    for name, tensor in trainer.model.state_dict().items():
        assert tensor.equal(before[name]) != name.endswith(("lora_A", "lora_B")), name
        assert trainer.model.get_parameter(name).grad is None


@pytest.mark.numeric
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_the_size_of_a_micro_batch_does_not_matter(tmp_path: Path, micro_batch: int) -> None:
    curves = []
    for number in (2, micro_batch):
        settings = lora_settings(training__micro_batch_size=number, lora__dropout=0.0)
        nano_trainer(tmp_path / f"{number}", "sft", **settings).train()
        curves.append(losses(tmp_path / f"{number}"))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_any_objective_trains_adapters(recipe: Any, corpus: Path) -> None:
    result = do(recipe("pretrain", data__sources=[str(corpus / "text.jsonl")]))
    assert result.adapter and "unigram_bits_per_byte" in result.summary


def test_what_lora_needs_is_said(recipe: Any, tokenizer_dir: Path) -> None:
    alone = recipe(model__init=None, tokenizer=str(tokenizer_dir))
    assert "give --model MODEL" in refused(alone, ConfigError)
    assert 'set optim.name = "adamw"' in refused(recipe(optim__name="muon"), ConfigError)
    stretched = refused(recipe(model__context=1024), ConfigError)
    assert "does not remember model.context=1024" in stretched
    assert "stretch the model first" in refused(recipe(data__seq_len=300), ConfigError)
    assert "did you mean mlp" in refused(recipe(lora__targets=["mpl"]), ConfigError)


def test_a_run_goes_on_beside_its_own_base_alone(recipe: Any, place: Path, tmp_path: Path) -> None:
    from minimind.model import save_model
    from minimind.tokenizer import Tokenizer

    base = tmp_path / "base"
    model, tokenizer = (
        load_model(place / "base" / "model"),
        Tokenizer.load(place / "base" / "model"),
    )
    save_model(base, model, tokenizer)
    started = recipe(model__init=str(base), training__steps=4, checkpoint__every=2)
    do(started)
    (tmp_path / "run" / "summary.json").unlink()
    with torch.no_grad():
        model.model.norm.weight.add_(0.001)
    save_model(base, model, tokenizer)
    message = refused(started, CheckpointError)
    assert f"{base} is not the model that this run began with" in message


def test_a_run_of_lora_is_no_model_to_start_from(recipe: Any, tmp_path: Path) -> None:
    do(recipe())
    again = nano_recipe("sft", tmp_path / "more", model__init=str(tmp_path / "run"))
    assert "minimind merge MODEL --adapter" in refused(again, ModelError)


def test_other_lora_settings_are_another_recipe(recipe: Any) -> None:
    do(recipe())
    assert "lora.rank was 4 and is now 5" in refused(recipe(lora__rank=5), ConfigError)
    whole = refused(recipe().model_copy(update={"lora": None}), ConfigError)
    assert "lora.rank was 4 and is now not set" in whole


def test_fresh_forgets_an_adapter(recipe: Any, tmp_path: Path) -> None:
    do(recipe())
    result = do(recipe(lora__rank=2), fresh=True)
    assert result.adapter is not None
    tensors = load_file(result.adapter / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in tensors.values()} == {2}


# What is measured beside the stage's own loss.


def test_the_model_that_a_stage_starts_from_is_measured_first(recipe: Any, tmp_path: Path) -> None:
    written = iter(["before", "after"])
    result = do(recipe(), write_samples=lambda m, t: [{"prompt": "?", "text": next(written)}])
    run = tmp_path / "run"
    first, last = metrics(run, "validation")
    assert (first["step"], last["step"]) == (0, 10)
    assert result.summary["first_loss"] == first["loss"] > last["loss"] == result.summary["loss"]
    samples = metrics(run, "sample")
    assert [(line["step"], line["text"]) for line in samples] == [(0, "before"), (10, "after")]


def test_a_new_model_is_not(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    recipe = nano_recipe(
        "pretrain",
        tmp_path,
        data__sources=[str(corpus / "text.jsonl")],
        data__validation_fraction=0.1,
        tokenizer=str(tokenizer_dir),
        training__steps=3,
    )
    summary = do(recipe).summary
    assert [line["step"] for line in metrics(tmp_path, "validation")] == [3]
    assert "first_loss" not in summary


def test_general_sets_are_measured_each_time(recipe: Any, corpus: Path, tmp_path: Path) -> None:
    """Text and conversations; what is not trained on, and what may be forgotten."""
    general = [str(corpus / "text.jsonl"), str(corpus / "chat.jsonl")]
    prepared = prepare_stage(recipe(data__retention=general), reporter=RecordingReporter())
    assert prepared.trainer.retention is not None
    text, chat = prepared.trainer.retention.datasets
    assert text.batch(0, 1).segments is None and chat.batch(0, 1).segments is not None
    summary = do(recipe(data__retention=general, optim__lr=0.1)).summary
    first, last = metrics(tmp_path / "run", "validation")
    for key in ("retention_loss", "retention_bits_per_byte"):
        assert summary[f"first_{key}"] == first[key]
        assert summary[key] == last[key] != first[key]
        assert math.isfinite(last[key])


def test_general_sets_are_part_of_the_data(recipe: Any, corpus: Path, tmp_path: Path) -> None:
    copy = tmp_path / "general.jsonl"
    copy.write_bytes((corpus / "chat.jsonl").read_bytes())
    begun = recipe(data__retention=[str(copy)], checkpoint__every=5)
    do(begun)
    (tmp_path / "run" / "summary.json").unlink()
    copy.write_bytes(copy.read_bytes() * 2)
    assert "has changed since this run began" in refused(begun, CheckpointError)


def test_placeholders_are_filled_and_those_left_are_told(recipe: Any, tmp_path: Path) -> None:
    data = tmp_path / "who.jsonl"
    turns = [
        {"role": "user", "content": "你是谁？"},
        {"role": "assistant", "content": "我是{{name}}，{{author}}的模型。"},
    ]
    lines = [json.dumps({"conversations": turns}) for _ in range(200)]
    data.write_text("\n".join(lines), encoding="utf-8")
    told = RecordingReporter()
    given = {"data__sources": [str(data)], "data__validation_fraction": 0.0}
    fill = {"name": "小明", "autor": "李雷"}
    for _ in range(2):  # a store that is there is told of as well
        message = refused(recipe(data__variables=fill, **given), DataError)
        assert (
            "nothing fills {{author}}, which is in 200 of 200 records; give data.variables.author"
            in message
        )
        assert message.endswith("(data.variables has name, autor)")
    prepare_stage(recipe(**given), reporter=told)
    assert len([line for line in told.lines if ": nothing fills {{" in line]) == 2
    told = RecordingReporter()
    prepared = prepare_stage(
        recipe(data__variables=fill | {"author": "李雷"}, **given), reporter=told
    )
    text = prepared.tokenizer.decode(
        prepared.stores.sources[0].shards("train")[0].tokens[:40].tolist()
    )
    assert "小明" in text and "李雷" in text and "{{" not in text
    [line] = [line for line in told.lines if "{{" in line]
    assert line == "data.variables.autor fills nothing: no record holds {{autor}}"


def test_a_schema_is_of_one_source_alone(recipe: Any, tmp_path: Path, corpus: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"instruction": "译", "input": 3, "output": "three", "messages": [{"role": "other"}]}
    path.write_text("\n".join([json.dumps(row)] * 200), encoding="utf-8")
    fill = {"name": "小明", "author": "李雷"}
    table = {"path": str(path), "schema": "alpaca"}
    settings = {
        "data__variables": fill,
        "data__retention": ["textbook:general"],
        "data__validation": [str(corpus / "chat.jsonl")],
    }
    message = refused(recipe(data__sources=[str(path), "textbook:identity"], **settings), DataError)
    assert "unknown role 'other'" in message
    assert 'data.sources=[{path="FILE", schema="NAME"}]' in message
    told = RecordingReporter()
    prepared = prepare_stage(
        recipe(data__sources=[table, "textbook:identity"], **settings), reporter=told
    )
    documents = [store.manifest["train"]["documents"] for store in prepared.stores.sources]
    assert documents == [200, 3000]
    assert f"{path}: keys of records that are not used: messages (200)" in told.lines


def test_the_textbooks_identity_needs_a_name_and_an_author(recipe: Any, place: Path) -> None:
    given = {"data__sources": ["textbook:identity"]}
    message = refused(recipe(**given), ConfigError)
    assert "give data.variables.name=… data.variables.author=…" in message
    fill = {"name": "小明", "author": "李雷"}
    told = RecordingReporter()
    prepared = prepare_stage(recipe(data__variables=fill, **given), reporter=told)
    store = prepared.stores.sources[0]
    assert store.manifest["train"]["documents"] + store.manifest["validation"]["documents"] == 3000
    assert not any("nothing fills" in line for line in told.lines)
    before = (place / "stores" / "textbook-identity.jsonl").stat().st_mtime_ns
    prepare_stage(recipe(data__variables=fill, **given), reporter=told)
    assert (place / "stores" / "textbook-identity.jsonl").stat().st_mtime_ns == before
