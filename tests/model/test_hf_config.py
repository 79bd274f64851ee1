"""Writing, reading and refusing config.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind.errors import ModelError
from minimind.model import (
    Transformer,
    load_model,
    read_config,
    save_model,
)
from minimind.tokenizer import Tokenizer
from tests.support.config_json import change_config
from tests.support.rounding import largest_difference, logits_rounding


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt2"},
            "model_type 'gpt2' is not supported; supported are llama, qwen3, granitemoe",
        ),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"hidden_size": "32"}, "hidden_size: Input should be a valid integer"),
        ({"hidden_size": True}, "hidden_size: Input should be a valid integer"),
        ({"hidden_size": 16}, r"has the shape \[600, 32\], but config.json says \[600, 16\]"),
        ({"vocab_size": 10**18}, "too large for any file"),
        ({"vocab_size": 10**30}, "too large for any file"),
        ({"num_hidden_layers": 10**9}, "says 1,000,000,000 layers, but the weights have fewer"),
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
            "beta_fast is not a setting of rope_type 'linear'",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1e-320}},
            "rope_parameters.beta_fast: Input should be greater",
        ),
        (
            {"rope_theta": 1.0000001, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "must be at least 1.1 with rope_scaling",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 is not"),
        ({"rope_parameters": [1]}, "rope_parameters is not an object"),
        ({"rope_scaling": "x"}, "rope_scaling is not an object"),
        (
            {"rope_theta": 1.0, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "must be at least 1.1 with rope_scaling",
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
def test_an_unsupported_or_mismatched_config_is_refused(
    saved: Path, changes: dict[str, Any], message: str
) -> None:
    change_config(saved, **changes)
    with pytest.raises(ModelError, match=message):
        load_model(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_local_experts": None}, "num_local_experts: missing"),
        ({"num_local_experts": 0}, "num_local_experts is 0"),
        ({"num_local_experts": -4}, "num_local_experts: Input should be greater"),
        ({"num_local_experts": 5}, r"has the shape \[4, 32\], but config.json says \[5, 32\]"),
        ({"num_local_experts": 10**30}, "too large for any file"),
        ({"num_experts_per_tok": 5}, r"\(5\) must not exceed num_local_experts \(4\)"),
        ({"shared_intermediate_size": 0}, "has unknown tensors: .*shared_mlp"),
        ({"shared_intermediate_size": 64}, "has the shape"),
        ({"logits_scaling": 0}, "logits_scaling: Input should be greater than 0"),
        ({"attention_multiplier": "x"}, "attention_multiplier: Input should be a valid number"),
        ({"head_dim": 0}, "head_dim: Input should be greater"),
        ({"model_type": "granitemoe"}, "has unknown tensors: .*shared_mlp"),
        ({"model_type": "llama"}, "lacks .*mlp"),
    ],
)
def test_a_mismatched_mixture_of_experts_is_refused(
    random_model: Callable[..., Transformer],
    tokenizer: Tokenizer,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    save_model(tmp_path / "model", random_model("nano-moe"), tokenizer)
    change_config(tmp_path / "model", **changes)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path / "model")


def test_only_a_mixture_of_experts_has_keys_for_experts(
    random_model: Callable[..., Transformer], saved: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = json.loads((saved / "config.json").read_text("utf-8"))
    assert not any("expert" in key or "multiplier" in key for key in config)
    save_model(tmp_path / "moe", random_model("nano-moe"), tokenizer)
    config = json.loads((tmp_path / "moe" / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["GraniteMoeSharedForCausalLM"]
    assert config["model_type"] == "granitemoeshared"
    assert config["attention_multiplier"] == 8**-0.5  # the default of transformers is 1
    change_config(tmp_path / "moe", attention_multiplier=None)
    assert read_config(tmp_path / "moe").attention_multiplier == 1.0


def test_missing_keys_have_the_defaults_of_transformers(saved: Path) -> None:
    change_config(saved, head_dim=None, rms_norm_eps=None, rope_parameters=None, rope_theta=None)
    config = read_config(saved)
    assert (config.head_dim, config.rms_norm_eps, config.rope_theta) == (8, 1e-6, 10_000)
    change_config(saved, rope_theta=500_000)  # as written by transformers 4
    assert read_config(saved).rope_theta == 500_000
    change_config(saved, rope_scaling={"type": "dynamic", "factor": 2.0})
    config = read_config(saved)
    assert config.rope_scaling is not None
    assert config.rope_scaling.rope_type == "dynamic"
    assert config.rope_scaling.original_max_position_embeddings == 512
    assert config.max_position_embeddings == 1024


def test_dynamic_scaling_starts_from_max_position_embeddings(
    random_model: Callable[..., Transformer], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """As in transformers, which ignores original_max_position_embeddings here."""
    transformers = pytest.importorskip("transformers")
    save_model(tmp_path / "model", random_model("nano", max_position_embeddings=64), tokenizer)
    rope = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 32}
    change_config(
        tmp_path / "model", rope_parameters=rope | {"rope_theta": 10_000.0}, rope_scaling=None
    )
    ours = load_model(tmp_path / "model").eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.randint(0, 600, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for length in (50, 200):
            expected = theirs(ids[:, :length]).logits
            actual = ours.logits(ours(ids[:, :length]))
            assert largest_difference(actual, expected) <= logits_rounding(ours.config, length)
    save_model(tmp_path / "again", ours, tokenizer)
    assert read_config(tmp_path / "again") == ours.config
