"""Small random model directories of every architecture, with a tokenizer rich in merges."""

from pathlib import Path

import torch

from minimind.model import ModelConfig, Transformer, extend_context, save_model
from minimind.tokenizer import Tokenizer

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
}
ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": {},
    "untied": {"tie_word_embeddings": False},
    "qwen3": {"qk_norm": True},
    "experts": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
    },
    "granite": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
    },
}
_SCALINGS: dict[str, dict[str, object]] = {
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "yarn-factor": {
        "rope_type": "yarn",
        "factor": 2.5,
        "attention_factor": 1.5,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 2.5,
        "mscale": 2.0,
        "mscale_all_dim": 0.5,
        "truncate": True,
    },
}
EXTENDED = ("linear", "yarn", *_SCALINGS)


def small_model(kind: str, vocab_size: int, **shape: object) -> Transformer:
    """A model of one of ARCHITECTURES, or of EXTENDED, with large random weights."""
    shape = _SHAPE | ARCHITECTURES.get(kind, {}) | {"vocab_size": vocab_size} | shape
    config = ModelConfig.model_validate(shape)
    if kind in ("linear", "yarn", "dynamic"):
        config = extend_context(config, 160, kind)  # type: ignore[arg-type]
    elif kind in _SCALINGS:
        scaling = _SCALINGS[kind] | {"original_max_position_embeddings": 64}
        config = ModelConfig.model_validate(
            config.model_dump() | {"rope_scaling": scaling, "max_position_embeddings": 160}
        )
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(torch.rand_like(parameter))
    return model.eval()


def save_small_model(
    directory: Path, kind: str, tokenizer: Tokenizer, **shape: object
) -> Transformer:
    """Write a model directory of that kind and return the model."""
    model = small_model(kind, tokenizer.vocab_size, **shape)
    save_model(directory, model, tokenizer)
    return model
