"""The transformer, and reading and writing it as a Hugging Face model directory."""

from minimind.config.model import PRESETS, ModelConfig
from minimind.model.cache import KVCache
from minimind.model.directory import load_model, read_config, resolve_model_directory, save_model
from minimind.model.rope import extend_context
from minimind.model.transformer import Transformer

__all__ = [
    "PRESETS",
    "KVCache",
    "ModelConfig",
    "Transformer",
    "extend_context",
    "load_model",
    "read_config",
    "resolve_model_directory",
    "save_model",
]
