"""The transformer, LoRA adapters, and model directories in Hugging Face's layout.

To read the code, begin with `transformer.py`, then `attention.py` and `rope.py`, `feed_forward.py`
and `experts.py`, `kv_cache.py`, `lora.py`; files are read and written by `directory.py`,
`hf_config.py`, `saving.py` and `adapter.py`.
"""

from minimind.config.model import PRESETS, ModelConfig
from minimind.model.adapter import merge_adapter, resolve_adapter_directory, save_adapter
from minimind.model.directory import load_model, resolve_model_directory
from minimind.model.fingerprint import fingerprint
from minimind.model.hf_config import read_config
from minimind.model.kv_cache import KVCache
from minimind.model.lora import apply_lora
from minimind.model.rope import extend_context
from minimind.model.saving import save_model
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
