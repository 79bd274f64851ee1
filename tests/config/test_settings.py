from pathlib import Path

import pytest
from pydantic import ValidationError

from minimind.config import PRESETS, ModelConfig
from minimind.config.settings import DataSettings, ModelSettings, Recipe


@pytest.mark.parametrize(
    ("value", "path", "weight"),
    [
        ("a.jsonl", "a.jsonl", 1.0),
        ("a.jsonl@3", "a.jsonl", 3.0),
        ("me@home/a.jsonl", "me@home/a.jsonl", 1.0),
        ({"path": "a@3", "weight": 0.5}, "a@3", 0.5),
    ],
)
def test_sources_are_paths_with_a_weight(value: object, path: str, weight: float) -> None:
    (source,) = DataSettings.model_validate({"sources": [value]}).sources
    assert (source.path, source.weight) == (path, weight)


def test_a_weight_must_be_positive() -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        DataSettings.model_validate({"sources": ["a@0"]})


def test_settings_of_experts_are_validated() -> None:
    shape = ModelSettings(preset="moe", num_local_experts=8, num_experts_per_tok=3).shape(6400)
    assert (shape.num_local_experts, shape.active_intermediate_size) == (8, 3 * 1408 + 2816)
    assert ModelConfig(**PRESETS["small"]).active_intermediate_size == 1408
    for wrong, message in [
        (dict(preset="moe", num_experts_per_tok=5), "must not exceed num_local_experts"),
        (dict(preset="moe", qk_norm=True), "qk_norm cannot be combined with num_local_experts"),
        (dict(preset="moe", num_local_experts=0), "a dense model has no expert settings"),
        (dict(preset="small", shared_intermediate_size=64), "num_local_experts is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ModelSettings(**wrong).shape(6400)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_complete(preset: str) -> None:
    shape = ModelSettings(preset=preset).shape(vocab_size=6400)
    assert shape == ModelConfig(**PRESETS[preset], vocab_size=6400)


def test_settings_override_the_preset() -> None:
    shape = ModelSettings(preset="small", num_hidden_layers=2, qk_norm=True).shape(vocab_size=300)
    assert (shape.num_hidden_layers, shape.hidden_size, shape.vocab_size) == (2, 512, 300)
    assert shape.architecture == "Qwen3ForCausalLM"


def test_key_value_heads_must_divide_query_heads() -> None:
    with pytest.raises(ValidationError, match="must be a multiple of"):
        ModelSettings(num_attention_heads=6, num_key_value_heads=4).shape(vocab_size=300)


def test_a_context_can_only_be_extended_for_an_existing_model() -> None:
    with pytest.raises(ValidationError, match="context extends an existing model"):
        ModelSettings(context=2048)
    with pytest.raises(ValidationError, match="rope_scaling has no effect without context"):
        ModelSettings(init="out/run", rope_scaling="linear")
    ModelSettings(init="out/run", context=2048, rope_scaling="linear")


def test_an_existing_model_accepts_no_architecture_settings() -> None:
    for settings in ({"hidden_size": 64}, {"preset": "base"}, {"num_hidden_layers": 2}):
        with pytest.raises(
            ValidationError, match=f"{next(iter(settings))}: cannot be set for an existing model"
        ):
            ModelSettings(init="out/run", **settings)  # type: ignore[arg-type]
    ModelSettings(
        init="out/run", preset="small"
    )  # the default, as in the recipe of a run directory


@pytest.mark.parametrize("name", ["a@2", "a@0.5", "x@1.jsonl", "a@2@3"])
def test_a_path_that_exists_is_not_split_at_its_at_sign(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    for value, weight in ((name, 1.0), (f"{tmp_path}/{name}", 1.0), (f"{name}@4", 4.0)):
        (source,) = DataSettings.model_validate({"sources": [value]}).sources
        assert source.path == value.removesuffix("@4")
        assert (source.weight, source.record_schema) == (weight, "auto")


def test_each_source_has_its_own_schema() -> None:
    table = {"path": "a.csv", "schema": "qa"}
    settings = DataSettings.model_validate(
        {
            "sources": [table | {"weight": 2.0}, "b"],
            "validation": [table, "c@2"],
            "retention": ["d"],
        }
    )
    assert [source.record_schema for source in settings.sources] == ["qa", "auto"]
    assert [(file.path, file.record_schema) for file in settings.validation] == [
        ("a.csv", "qa"),
        ("c@2", "auto"),
    ]
    with pytest.raises(ValidationError, match=r"sources\.0\.schema"):
        DataSettings.model_validate({"sources": [table | {"schema": "alpacca"}]})
    with pytest.raises(ValidationError, match="record_schema"):
        DataSettings.model_validate({"record_schema": "qa"})


def test_architecture_settings_are_the_fields_of_the_model_config() -> None:
    """With the same types, bounds and descriptions; all are optional."""
    not_settable = {
        *("vocab_size", "rope_scaling", "tie_word_embeddings", "embedding_multiplier"),
        *("residual_multiplier", "logits_scaling", "attention_multiplier"),
    }
    settings = ModelSettings.model_fields.keys() - {"init", "context", "rope_scaling", "preset"}
    assert settings == ModelConfig.model_fields.keys() - not_settable
    for name in settings:
        ours, theirs = ModelSettings.model_fields[name], ModelConfig.model_fields[name]
        assert ours.annotation == theirs.annotation | None, name
        assert ours.description == theirs.description, name
        assert set(theirs.metadata) <= set(ours.metadata), name
        assert ours.default is None, name


def test_paths_of_a_run_may_begin_with_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given = {"objective": "sft", "out": "~/a", "tokenizer": "~/b", "model": {"init": "~/c"}}
    recipe = Recipe.model_validate(given)
    paths = [recipe.out, recipe.tokenizer, recipe.model.init]
    assert paths == [f"{tmp_path}/{name}" for name in "abc"]
    assert Recipe(objective="sft", out="./a~/").out == "./a~/"
