"""LoRA as a stage, and what fine-tuning stages measure: the base model and the retention set."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minimind.config.settings import Recipe
from minimind.errors import CheckpointError, ConfigError, DataError, ModelError
from minimind.inference.load import load_for_inference
from minimind.model import load_model
from minimind.training.stage import prepare_stage, run_stage
from tests.support.small_runs import (
    RecordingReporter,
    lora_settings,
    losses,
    metrics,
    nano_recipe,
    nano_trainer,
)
from tests.support.stages import refused, train


@pytest.fixture(scope="module")
def folder(corpus: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, a finished pretraining run."""
    root = tmp_path_factory.mktemp("lora")
    settings = {"tokenizer": str(tokenizer_dir), "training__steps": 20}
    sources = [str(corpus / "text.jsonl")]
    recipe = nano_recipe("pretrain", root / "base", data__sources=sources, **settings)
    run_stage(recipe, reporter=RecordingReporter())
    return root


@pytest.fixture
def recipe(folder: Path, corpus: Path, tmp_path: Path) -> Any:
    """Return a function that makes recipes of ten LoRA steps in `tmp_path / "run"`."""

    def make(objective: str = "sft", **settings: Any) -> Recipe:
        defaults: dict[str, Any] = {
            "model__init": str(folder / "base"),
            "data__sources": [str(corpus / "chat.jsonl")],
            "data__store": str(folder / "stores"),
            "data__validation_fraction": 0.1,
            "training__steps": 10,
            "optim__lr": 0.01,
        }
        return nano_recipe(objective, tmp_path / "run", **lora_settings(**defaults | settings))

    return make


@pytest.mark.numeric
def test_lora_writes_an_adapter_and_does_not_change_the_base(
    recipe: Any, folder: Path, tmp_path: Path
) -> None:
    weights = folder / "base" / "model" / "model.safetensors"
    before, reporter = weights.read_bytes(), RecordingReporter()
    result = train(recipe(), reporter)
    run = tmp_path / "run"
    assert (result.model, result.adapter, result.finished) == (None, run / "adapter", True)
    assert not (run / "model").exists()
    assert weights.read_bytes() == before
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(bool(t.any()) for name, t in tensors.items() if "lora_B" in name), (
        "every adapter is trained"
    )
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    assert summary == result.summary
    assert summary["trained_parameters"] == sum(t.numel() for t in tensors.values())
    assert summary["parameters"] > summary["trained_parameters"]
    assert summary["base"] == str(folder / "base")
    assert any("of them trained" in line for line in reporter.lines)
    [checkpoint] = (run / "checkpoints").iterdir()
    kept = load_file(checkpoint / "model.safetensors")
    assert {f"base_model.model.{name}.weight" for name in kept} == tensors.keys()
    assert train(recipe()).adapter == result.adapter, "a finished run is not repeated"
    assert losses(run)[-1] < losses(run)[0] - 0.2
    merged, _ = load_for_inference(folder / "base", "cpu", adapter=run, dtype=torch.float32)
    plain = load_model(folder / "base" / "model")
    changed = {
        name.rpartition(".")[0].rpartition(".")[2]
        for name, tensor in merged.state_dict().items()
        if not tensor.equal(plain.state_dict()[name])
    }
    assert changed == {*(f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down"))}


@pytest.mark.parametrize("preset", ["nano", "nano-moe"])
def test_frozen_weights_stay_bit_identical(tmp_path: Path, preset: str) -> None:
    settings = lora_settings(optim__lr=0.05, model__preset=preset)
    trainer = nano_trainer(tmp_path, "sft", **settings)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    for name, tensor in trainer.model.state_dict().items():
        assert tensor.equal(before[name]) != name.endswith(("lora_A", "lora_B")), name
        assert trainer.model.get_parameter(name).grad is None


@pytest.mark.numeric
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_the_micro_batch_size_does_not_change_the_loss(tmp_path: Path, micro_batch: int) -> None:
    curves = []
    for number in (2, micro_batch):
        settings = lora_settings(training__micro_batch_size=number, lora__dropout=0.0)
        nano_trainer(tmp_path / f"{number}", "sft", **settings).train()
        curves.append(losses(tmp_path / f"{number}"))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_adapters_can_be_trained_with_any_objective(recipe: Any, corpus: Path) -> None:
    result = train(recipe("pretrain", data__sources=[str(corpus / "text.jsonl")]))
    assert result.adapter and "unigram_bits_per_byte" in result.summary


def test_missing_requirements_of_lora_are_reported(recipe: Any, tokenizer_dir: Path) -> None:
    without_model = recipe(model__init=None, tokenizer=str(tokenizer_dir))
    assert "give --model MODEL" in refused(without_model, ConfigError)
    assert 'set optim.name = "adamw"' in refused(recipe(optim__name="muon"), ConfigError)
    message = refused(recipe(model__context=1024), ConfigError)
    assert "does not store model.context=1024" in message
    assert "extend the context first" in refused(recipe(data__seq_len=300), ConfigError)
    assert "did you mean mlp" in refused(recipe(lora__targets=["mpl"]), ConfigError)


def test_a_run_resumes_only_with_its_own_base(recipe: Any, folder: Path, tmp_path: Path) -> None:
    from minimind.model import save_model
    from minimind.tokenizer import Tokenizer

    base = tmp_path / "base"
    model, tokenizer = (
        load_model(folder / "base" / "model"),
        Tokenizer.load(folder / "base" / "model"),
    )
    save_model(base, model, tokenizer)
    started = recipe(model__init=str(base), training__steps=4, checkpoint__every=2)
    train(started)
    (tmp_path / "run" / "summary.json").unlink()
    with torch.no_grad():
        model.model.norm.weight.add_(0.001)
    save_model(base, model, tokenizer)
    message = refused(started, CheckpointError)
    assert f"{base} is not the base model that this run began with" in message


def test_a_lora_run_is_not_a_model_to_start_from(recipe: Any, tmp_path: Path) -> None:
    train(recipe())
    again = nano_recipe("sft", tmp_path / "more", model__init=str(tmp_path / "run"))
    assert "minimind merge MODEL --adapter" in refused(again, ModelError)


def test_other_lora_settings_are_another_recipe(recipe: Any) -> None:
    train(recipe())
    assert "lora.rank was 4 and is now 5" in refused(recipe(lora__rank=5), ConfigError)
    message = refused(recipe().model_copy(update={"lora": None}), ConfigError)
    assert "lora.rank was 4 and is now not set" in message


def test_fresh_removes_an_adapter(recipe: Any, tmp_path: Path) -> None:
    train(recipe())
    result = train(recipe(lora__rank=2), fresh=True)
    assert result.adapter is not None
    tensors = load_file(result.adapter / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in tensors.values()} == {2}


# Metrics in addition to the stage's own loss.


def test_a_stage_validates_the_model_it_starts_from(recipe: Any, tmp_path: Path) -> None:
    texts = iter(["before", "after"])
    result = train(recipe(), generate_samples=lambda m, t: [{"prompt": "?", "text": next(texts)}])
    run = tmp_path / "run"
    first, last = metrics(run, "validation")
    assert (first["step"], last["step"]) == (0, 10)
    assert result.summary["first_loss"] == first["loss"] > last["loss"] == result.summary["loss"]
    samples = metrics(run, "sample")
    assert [(line["step"], line["text"]) for line in samples] == [(0, "before"), (10, "after")]


def test_a_new_model_is_not_validated_before_training(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    recipe = nano_recipe(
        "pretrain",
        tmp_path,
        data__sources=[str(corpus / "text.jsonl")],
        data__validation_fraction=0.1,
        tokenizer=str(tokenizer_dir),
        training__steps=3,
    )
    summary = train(recipe).summary
    assert [line["step"] for line in metrics(tmp_path, "validation")] == [3]
    assert "first_loss" not in summary


def test_retention_sets_are_measured_at_every_validation(
    recipe: Any, corpus: Path, tmp_path: Path
) -> None:
    """Retention sets may be text or conversations."""
    retention = [str(corpus / "text.jsonl"), str(corpus / "chat.jsonl")]
    prepared = prepare_stage(recipe(data__retention=retention), reporter=RecordingReporter())
    assert prepared.trainer.retention is not None
    text, chat = prepared.trainer.retention.datasets
    assert text.batch(0, 1).segments is None and chat.batch(0, 1).segments is not None
    summary = train(recipe(data__retention=retention, optim__lr=0.1)).summary
    first, last = metrics(tmp_path / "run", "validation")
    for key in ("retention_loss", "retention_bits_per_byte"):
        assert summary[f"first_{key}"] == first[key]
        assert summary[key] == last[key] != first[key]
        assert math.isfinite(last[key])


def test_changed_retention_sets_are_changed_data(recipe: Any, corpus: Path, tmp_path: Path) -> None:
    copy = tmp_path / "retention.jsonl"
    copy.write_bytes((corpus / "chat.jsonl").read_bytes())
    begun = recipe(data__retention=[str(copy)], checkpoint__every=5)
    train(begun)
    (tmp_path / "run" / "summary.json").unlink()
    copy.write_bytes(copy.read_bytes() * 2)
    assert "has changed since this run began" in refused(begun, CheckpointError)


def test_variables_are_filled_and_missing_ones_are_reported(recipe: Any, tmp_path: Path) -> None:
    data = tmp_path / "who.jsonl"
    turns = [
        {"role": "user", "content": "你是谁？"},
        {"role": "assistant", "content": "我是{{name}}，{{author}}的模型。"},
    ]
    lines = [json.dumps({"conversations": turns}) for _ in range(200)]
    data.write_text("\n".join(lines), encoding="utf-8")
    reporter = RecordingReporter()
    settings = {"data__sources": [str(data)], "data__validation_fraction": 0.0}
    fill = {"name": "小明", "autor": "李雷"}
    for _ in range(2):  # reported for an existing store too
        message = refused(recipe(data__variables=fill, **settings), DataError)
        assert (
            "200 of 200 records contain {{author}}, which has no value; set data.variables.author"
            in message
        )
        assert message.endswith("(data.variables has name, autor)")
    prepare_stage(recipe(**settings), reporter=reporter)
    assert len([line for line in reporter.lines if "}}, which has no value" in line]) == 2
    reporter = RecordingReporter()
    prepared = prepare_stage(
        recipe(data__variables=fill | {"author": "李雷"}, **settings), reporter=reporter
    )
    text = prepared.tokenizer.decode(
        prepared.stores.sources[0].shards("train")[0].tokens[:40].tolist()
    )
    assert "小明" in text and "李雷" in text and "{{" not in text
    [line] = [line for line in reporter.lines if "{{" in line]
    assert line == "data.variables.autor is not used: no record contains {{autor}}"


def test_a_schema_applies_to_one_source_only(recipe: Any, tmp_path: Path, corpus: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"instruction": "译", "input": 3, "output": "three", "messages": [{"role": "other"}]}
    path.write_text("\n".join([json.dumps(row)] * 200), encoding="utf-8")
    fill = {"name": "小明", "author": "李雷"}
    table = {"path": str(path), "schema": "alpaca"}
    settings = {
        "data__variables": fill,
        "data__retention": ["textbook:retention"],
        "data__validation": [str(corpus / "chat.jsonl")],
    }
    message = refused(recipe(data__sources=[str(path), "textbook:identity"], **settings), DataError)
    assert "unknown role 'other'" in message
    assert 'data.sources=[{path="FILE", schema="NAME"}]' in message
    reporter = RecordingReporter()
    prepared = prepare_stage(
        recipe(data__sources=[table, "textbook:identity"], **settings), reporter=reporter
    )
    documents = [store.manifest["train"]["documents"] for store in prepared.stores.sources]
    assert documents == [200, 3000]
    assert f"{path}: unused keys of records: messages (200)" in reporter.lines


def test_the_identity_textbook_needs_a_name_and_an_author(recipe: Any, folder: Path) -> None:
    settings = {"data__sources": ["textbook:identity"]}
    message = refused(recipe(**settings), ConfigError)
    assert "set data.variables.name=… data.variables.author=…" in message
    fill = {"name": "小明", "author": "李雷"}
    reporter = RecordingReporter()
    prepared = prepare_stage(recipe(data__variables=fill, **settings), reporter=reporter)
    store = prepared.stores.sources[0]
    assert store.manifest["train"]["documents"] + store.manifest["validation"]["documents"] == 3000
    assert not any("nothing fills" in line for line in reporter.lines)
    before = (folder / "stores" / "textbook-identity.jsonl").stat().st_mtime_ns
    prepare_stage(recipe(data__variables=fill, **settings), reporter=reporter)
    assert (folder / "stores" / "textbook-identity.jsonl").stat().st_mtime_ns == before
