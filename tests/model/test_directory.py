import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimind.errors import ModelError, ResourceError
from minimind.model import (
    Transformer,
    load_model,
    read_config,
    resolve_model_directory,
    save_model,
)
from minimind.tokenizer import Tokenizer
from tests.support.rounding import largest_difference, logits_rounding

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}


@pytest.fixture
def model(random_model: Callable[..., Transformer]) -> Transformer:
    return random_model("nano")


@pytest.fixture
def saved(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save_model(tmp_path / "run" / "model", model, tokenizer)
    return tmp_path / "run" / "model"


def change(directory: Path, **changes: Any) -> None:
    """Set keys of config.json; None takes them out."""
    path = directory / "config.json"
    config = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("nano", {}),
        ("nano", {"qk_norm": True}),
        ("nano", {"tie_word_embeddings": False}),
        ("nano-moe", {}),
        ("nano-moe", {"shared_intermediate_size": 0, "logits_scaling": 6.0}),
        ("nano-moe", {"attention_multiplier": 0.5, "tie_word_embeddings": False}),
    ],
)
def test_a_model_comes_back_as_it_was(
    random_model: Callable[..., Transformer],
    tokenizer: Tokenizer,
    tmp_path: Path,
    preset: str,
    changes: dict[str, float],
) -> None:
    model = random_model(preset, **changes)
    save_model(tmp_path / "made" / "model", model, tokenizer)
    loaded = load_model(tmp_path / "made" / "model")
    assert loaded.config == model.config
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert os.listdir(tmp_path / "made") == ["model"]
    assert set(os.listdir(tmp_path / "made" / "model")) == FILES


def test_the_run_directory_means_its_model(saved: Path) -> None:
    assert resolve_model_directory(saved) == saved
    assert resolve_model_directory(saved.parent) == saved


def test_what_is_no_model_directory_is_told(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    for path, message in [
        (tmp_path / "nowhere", "there is no such directory"),
        (tmp_path / "unfinished", "a run that has not finished"),
        (tmp_path, "is not a model directory: it has no config.json"),
        (saved / "config.json", "is not a model directory"),
    ]:
        with pytest.raises(ModelError, match=message):
            resolve_model_directory(path)


def test_an_older_model_is_replaced_whole(
    saved: Path, random_model: Callable[..., Transformer], tokenizer: Tokenizer
) -> None:
    (saved / "notes.txt").write_text("of the older one")
    newer = random_model("nano", seed=1)
    save_model(saved, newer, tokenizer)
    assert torch.equal(load_model(saved).head_weight, newer.head_weight)
    assert set(os.listdir(saved)) == FILES
    assert os.listdir(saved.parent) == ["model"]


def test_a_model_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flushed(handle: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def renamed(source: Path, target: Path) -> None:
        if Path(target).name == "model":
            events.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    save_model(tmp_path / "model", model, tokenizer)
    at = events.index("renamed")
    assert {*FILES, ".model.new"} <= set(events[:at])
    assert events[at + 1 :] == [tmp_path.name]


def test_a_failed_save_leaves_the_older_model(
    saved: Path, random_model: Callable[..., Transformer]
) -> None:
    class Broken:
        end_of_text, stop_ids, model_ids = 0, (0,), {"eos_token_id": 0}

        def save(self, directory: Path) -> None:
            raise OSError(28, "No space left on device")

    before = {name: (saved / name).read_bytes() for name in FILES}
    newer = random_model("nano", seed=1)
    with pytest.raises(ResourceError, match=r"No space left.*needs 151,168 bytes, and [\d,]+ are"):
        save_model(saved, newer, Broken())
    assert {name: (saved / name).read_bytes() for name in FILES} == before
    assert os.listdir(saved.parent) == ["model"]


def test_what_a_killed_save_left_is_swept_up(
    saved: Path, model: Transformer, tokenizer: Tokenizer
) -> None:
    half = saved.with_name(".model.new")
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    save_model(saved, model, tokenizer)
    assert os.listdir(saved.parent) == ["model"]
    # Killed between the two renames: the older model is the only one, until the new one is whole.
    saved.rename(saved.with_name(".model.old"))
    with pytest.raises(AttributeError):
        save_model(saved, model, object())  # type: ignore[arg-type]
    assert load_model(saved).config == model.config
    assert os.listdir(saved.parent) == ["model"]


def test_nothing_but_a_model_is_replaced(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for place in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ModelError, match="is not a model; give another directory"):
            save_model(place, model, tokenizer)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    save_model(tmp_path / "empty", model, tokenizer)
    assert set(os.listdir(tmp_path / "empty")) == FILES


def test_a_place_that_cannot_be_written_is_named(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="model could not be written"):
        save_model(tmp_path / "file" / "model", model, tokenizer)
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.skipif(
    os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="nothing is forbidden to root",
)
def test_a_read_only_folder_is_named(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(ResourceError, match="Permission denied"):
            save_model(tmp_path / "model", model, tokenizer)
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.skipif(not os.path.exists("/proc/version"), reason="needs Linux's /proc")
def test_a_folder_where_nothing_can_be_made_is_named(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ResourceError, match="model could not be written"):
        save_model(Path("/proc/minimind/model"), model, tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; llama, qwen3, granitemoe"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"hidden_size": None}, "hidden_size missing"),
        ({"hidden_size": "32"}, "hidden_size: Input should be a valid integer"),
        ({"hidden_size": True}, "hidden_size: Input should be a valid integer"),
        ({"hidden_size": 16}, r"has the shape \[600, 32\], config.json says \[600, 16\]"),
        ({"vocab_size": 10**18}, "promises more than any file can hold"),
        ({"vocab_size": 10**30}, "promises more than any file can hold"),
        ({"num_hidden_layers": 10**9}, "promises 1,000,000,000 layers"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "has unknown tensors: model.layers.1."),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"head_dim": 7}, "must be even"),
        ({"rope_parameters": {"rope_type": "longrope"}}, 'rope_type = "longrope" is not supp'),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, r'rope_type = \["yarn"\] is not supported'),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor: Field required"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 0.5}}, "factor: Input should be gre"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "long_factor": [1.0]}},
            r"rope_parameters.long_factor = \[1.0\] is not supported",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "needs a low_freq_factor"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 1.0}},
            "beta_fast does not belong to the rope_type 'linear'",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1e-320}},
            "rope_parameters.beta_fast: Input should be greater",
        ),
        (
            {"rope_theta": 1.0000001, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "must be 1.1 or more to be scaled",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 is not"),
        ({"rope_parameters": [1]}, "rope_parameters is not an object"),
        ({"rope_scaling": "x"}, "rope_scaling is not an object"),
        (
            {"rope_theta": 1.0, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "must be 1.1 or more to be scaled",
        ),
        ({"attention_bias": True}, "attention_bias = true is not supported"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu" is not supported'),
        ({"use_sliding_window": True}, "use_sliding_window = true is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types with .*sliding"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        ({"quantization_config": {"bits": 4}}, 'quantization_config = {"bits": 4} is not supp'),
        ({"tie_word_embeddings": False}, "lacks lm_head.weight"),
        ({"tie_word_embeddings": None}, "lacks lm_head.weight"),  # transformers' default
        ({"model_type": "qwen3"}, "lacks .*q_norm.weight"),
    ],
)
def test_a_configuration_that_does_not_fit_is_told(
    saved: Path, changes: dict[str, Any], message: str
) -> None:
    change(saved, **changes)
    with pytest.raises(ModelError, match=message):
        load_model(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_local_experts": None}, "num_local_experts missing"),
        ({"num_local_experts": 0}, "num_local_experts is 0"),
        ({"num_local_experts": -4}, "num_local_experts: Input should be greater"),
        ({"num_local_experts": 5}, r"has the shape \[4, 32\], config.json says \[5, 32\]"),
        ({"num_local_experts": 10**30}, "promises more than any file can hold"),
        ({"num_experts_per_tok": 5}, r"\(5\) must not be more than num_local_experts \(4\)"),
        ({"shared_intermediate_size": 0}, "has unknown tensors: .*shared_mlp"),
        ({"shared_intermediate_size": 64}, "has the shape"),
        ({"logits_scaling": 0}, "logits_scaling: Input should be greater than 0"),
        ({"attention_multiplier": "x"}, "attention_multiplier: Input should be a valid number"),
        ({"head_dim": 0}, "head_dim: Input should be greater"),
        ({"model_type": "granitemoe"}, "has unknown tensors: .*shared_mlp"),
        ({"model_type": "llama"}, "lacks .*mlp"),
    ],
)
def test_a_mixture_of_experts_that_does_not_fit_is_told(
    random_model: Callable[..., Transformer],
    tokenizer: Tokenizer,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    save_model(tmp_path / "model", random_model("nano-moe"), tokenizer)
    change(tmp_path / "model", **changes)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path / "model")


def test_only_a_mixture_of_experts_has_words_for_experts(
    random_model: Callable[..., Transformer], saved: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = json.loads((saved / "config.json").read_text("utf-8"))
    assert not any("expert" in key or "multiplier" in key for key in config)
    save_model(tmp_path / "moe", random_model("nano-moe"), tokenizer)
    config = json.loads((tmp_path / "moe" / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["GraniteMoeSharedForCausalLM"]
    assert config["model_type"] == "granitemoeshared"
    assert config["attention_multiplier"] == 8**-0.5  # without it transformers takes 1
    change(tmp_path / "moe", attention_multiplier=None)
    assert read_config(tmp_path / "moe").attention_multiplier == 1.0


def test_defaults_are_those_of_transformers(saved: Path) -> None:
    change(saved, head_dim=None, rms_norm_eps=None, rope_parameters=None, rope_theta=None)
    config = read_config(saved)
    assert (config.head_dim, config.rms_norm_eps, config.rope_theta) == (8, 1e-6, 10_000)
    change(saved, rope_theta=500_000)  # as version 4 of transformers writes it
    assert read_config(saved).rope_theta == 500_000
    change(saved, rope_scaling={"type": "dynamic", "factor": 2.0})
    config = read_config(saved)
    assert config.rope_scaling is not None
    assert config.rope_scaling.rope_type == "dynamic"
    assert config.rope_scaling.original_max_position_embeddings == 512
    assert config.max_position_embeddings == 1024


def test_a_tied_head_that_is_another_matrix_is_refused(saved: Path, model: Transformer) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, path)
    assert torch.equal(load_model(saved).head_weight, model.head_weight)
    for other in (head + 1e-3, head[:-1].contiguous(), head.bfloat16()):
        save_file(tensors | {"lm_head.weight": other}, path)
        with pytest.raises(ModelError, match=r"lm_head\.weight is not .*\(tie_word_embeddings\)"):
            load_model(saved)
    save_file(tensors | {"lm_head.weight": head + 1e-3}, path)
    change(saved, tie_word_embeddings=False)
    assert torch.equal(load_model(saved).head_weight, head + 1e-3)


def test_dynamic_scaling_starts_from_max_position_embeddings(
    random_model: Callable[..., Transformer], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """As in transformers, whatever original_max_position_embeddings says."""
    transformers = pytest.importorskip("transformers")
    save_model(tmp_path / "model", random_model("nano", max_position_embeddings=64), tokenizer)
    rope = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 32}
    change(tmp_path / "model", rope_parameters=rope | {"rope_theta": 10_000.0}, rope_scaling=None)
    ours = load_model(tmp_path / "model").eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.randint(0, 600, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for length in (50, 200):
            expected = theirs(ids[:, :length]).logits
            found = ours.logits(ours(ids[:, :length]))
            assert largest_difference(found, expected) <= logits_rounding(ours.config, length)
    save_model(tmp_path / "again", ours, tokenizer)
    assert read_config(tmp_path / "again") == ours.config


def test_weights_of_other_kinds_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor.to(torch.int32) for name, tensor in tensors.items()}, path)
    with pytest.raises(ModelError, match="is of the kind I32; only F32, BF16, F16, F64 are read"):
        load_model(saved)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file({name: tensor.double() for name, tensor in tensors.items()}, path)
    assert load_model(saved).head_weight.dtype == torch.float32
    path.unlink()
    with pytest.raises(ModelError, match=r"there is no model\.safetensors"):
        load_model(saved)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is no index of weights"),
        ("{}", "is no index of weights"),
        ("[" * 100_000, "is no index of weights"),
        ('{"weight_map": ["a"]}', "is no index of weights"),
        ('{"weight_map": {"a": ["b"]}}', "is no index of weights"),
        ('{"weight_map": {"a": 5}}', "5 is not the name of a weights file beside it"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "is not the name of a weights file"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', "is not the name of a weights file"),
        ('{"weight_map": {"a": "b\\\\c.safetensors"}}', "is not the name of a weights file"),
        ('{"weight_map": {"a": "b.bin"}}', '"b.bin" is not the name of a weights file'),
        ('{"weight_map": {"a": "b.safetensors"}}', "b.safetensors, which the index names, is mis"),
        ('{"weight_map": {"a": "part.safetensors"}}', "it has no a, which the index says it has"),
        ('{"weight_map": {"model.norm.weight": "part.safetensors"}}', "promises 2 layers"),
        ('{"weight_map": {}}', "promises 2 layers"),
    ],
)
def test_an_index_of_weights_that_does_not_fit_is_told(
    saved: Path, index: str, message: str
) -> None:
    (saved / "model.safetensors").rename(saved / "part.safetensors")
    (saved / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=message):
        load_model(saved)


def test_what_no_index_names_is_not_read(saved: Path, model: Transformer) -> None:
    tensors = load_file(saved / "model.safetensors")
    places = {}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        places[name] = f"part-{number}.safetensors"
        stray = {"stray": torch.zeros(1)} if number == 0 else {}
        save_file({name: tensor} | stray, saved / places[name])
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    loaded = load_model(saved).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_loaded_model_does_not_hang_on_its_file(saved: Path, model: Transformer) -> None:
    loaded = load_model(saved)
    with torch.no_grad():
        loaded.head_weight[0] = 7.0
    assert torch.equal(load_model(saved).head_weight, model.head_weight)
    shutil.rmtree(saved)
    assert torch.equal(loaded.head_weight[1:], model.head_weight[1:])
