"""The transformer, its LoRA adapters, and reading and writing both as Hugging Face does."""

from minimind.config.model import PRESETS, ModelConfig
from minimind.model.directory import load_model, read_config, resolve_model_directory, save_model
from minimind.model.fingerprint import fingerprint
from minimind.model.kv_cache import KVCache
from minimind.model.lora import (
    apply_lora,
    merge_adapter,
    resolve_adapter_directory,
    save_adapter,
)
from minimind.model.rope import extend_context
from minimind.model.transformer import Transformer

__all__ = [
    "PRESETS",
    "KVCache",
    "ModelConfig",
    "Transformer",
    "apply_lora",
    "extend_context",
    "fingerprint",
    "load_model",
    "merge_adapter",
    "read_config",
    "resolve_adapter_directory",
    "resolve_model_directory",
    "save_adapter",
    "save_model",
]
