"""Convert Hugging Face's `config.json` to a `ModelConfig` and back; refuse unsupported models."""

import json
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from minimind.config.model import MOE_FIELDS, ModelConfig, RopeKind, RopeScaling
from minimind.errors import ModelError
from minimind.files import read_json_object

_MOE_TYPES = ("granitemoeshared", "granitemoe")  # the second has no shared experts
_MODEL_TYPES = ("llama", "qwen3", *_MOE_TYPES)
_REQUIRED = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
}
# Features of these model types that are not implemented: the values that leave them unused.
_UNUSED_VALUES: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (),
}


def to_config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return the content of `config.json`, without the token ids."""
    scaling, context = _rope_json(config)
    fields = config.model_dump(exclude={"qk_norm", "rope_theta", "rope_scaling", *MOE_FIELDS})
    model_type = "qwen3" if config.qk_norm else "llama"
    if config.num_local_experts:
        model_type = _MOE_TYPES[0]
        fields |= config.model_dump(include=set(MOE_FIELDS))
        fields["num_experts"] = config.num_local_experts  # trl reads this name
        # Written out because the default of transformers is 1.
        fields["attention_multiplier"] = config.attention_multiplier or config.head_dim**-0.5
    return fields | {
        "architectures": [config.architecture],
        "model_type": model_type,
        "max_position_embeddings": context,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        # transformers 5 reads `rope_parameters` and `dtype`, older tools the other keys.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta} | scaling,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling or None,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _rope_json(config: ModelConfig) -> tuple[dict[str, Any], int]:
    """Return `rope_scaling` and `max_position_embeddings` with the meaning transformers gives them.

    Under dynamic scaling, `max_position_embeddings` is the original context. Linear scaling has no
    key for the original context and needs none.
    """
    scaling = config.rope_scaling
    if scaling is None:
        return {}, config.max_position_embeddings
    content = scaling.model_dump(exclude_none=True)
    if scaling.rope_type == "dynamic":
        return content, content.pop("original_max_position_embeddings")
    if scaling.rope_type == "linear":
        del content["original_max_position_embeddings"]
    return content, config.max_position_embeddings


def read_config(directory: Path) -> ModelConfig:
    """Read `config.json`. Raises ModelError for models that are not supported."""
    path = directory / "config.json"
    try:
        raw = read_json_object(path)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as a model configuration: {error}") from error
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in _MODEL_TYPES:
        raise ModelError(
            f"{path}: model_type {model_type!r} is not supported; "
            f"supported are {', '.join(_MODEL_TYPES)}"
        )
    rope = _rope_parameters(path, raw)
    _check_supported(path, raw)
    fields = _config_fields(path, raw, rope, model_type)
    try:
        config = ModelConfig.model_validate(fields, strict=True)
    except ValidationError as error:
        raise ModelError(f"{path}: {_first_error(error)}") from error
    if config.attention_multiplier == config.head_dim**-0.5:
        config = config.model_copy(update={"attention_multiplier": None})
    return config


def _config_fields(
    path: Path, raw: dict[str, Any], rope: dict[str, Any], model_type: str
) -> dict[str, Any]:
    """Return the fields of a `ModelConfig`, with the defaults that transformers gives to each type.

    Raises ModelError when a required key is missing.
    """
    is_moe = model_type in _MOE_TYPES
    names = ModelConfig.model_fields.keys() - (() if is_moe else MOE_FIELDS)
    fields = {name: raw[name] for name in names if raw.get(name) is not None}
    fields["qk_norm"] = model_type == "qwen3"
    fields["tie_word_embeddings"] = raw.get("tie_word_embeddings", False)
    fields.pop("rope_scaling", None)
    if (theta := rope.pop("rope_theta", raw.get("rope_theta"))) is not None:
        fields["rope_theta"] = theta
    fields |= _rope_fields(path, rope, fields.get("max_position_embeddings"))
    fields.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
    fields.setdefault("rms_norm_eps", 1e-6)
    required = set(_REQUIRED)
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if model_type == "qwen3":
        required |= {"head_dim"}
    elif isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        fields.setdefault("head_dim", hidden // heads)
    if is_moe:
        required |= {"num_local_experts", "num_experts_per_tok"}
        if not fields.get("num_local_experts", 1):
            raise ModelError(
                f"{path}: num_local_experts is 0, but {model_type} is a mixture of experts"
            )
        fields.setdefault("attention_multiplier", 1.0)
        if model_type == "granitemoe":
            fields["shared_intermediate_size"] = 0
    if missing := sorted(required - fields.keys()):
        raise ModelError(f"{path}: {', '.join(missing)}: missing, but required")
    return fields


def _check_supported(path: Path, raw: dict[str, Any]) -> None:
    """Raise ModelError for the first feature that is not implemented."""
    for key, unused_values in _UNUSED_VALUES.items():
        value = raw.get(key)
        if value is not None and value not in unused_values:
            raise ModelError(f"{path}: {key} = {short_json(value)} is not supported")
    layers = raw.get("layer_types") or []
    if not isinstance(layers, list):
        raise ModelError(f"{path}: layer_types is not a list")
    for layer in layers:
        if layer != "full_attention":
            raise ModelError(f"{path}: layer_types with {short_json(layer)} is not supported")


def _rope_parameters(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Return `rope_scaling` (transformers 4) or `rope_parameters` (5), without null values."""
    for key in ("rope_scaling", "rope_parameters"):
        if raw.get(key) is not None and not isinstance(raw[key], dict):
            raise ModelError(f"{path}: {key} is not an object")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # precedence as in version 5
    return {name: value for name, value in rope.items() if value is not None}


def _rope_fields(path: Path, rope: dict[str, Any], context: Any) -> dict[str, Any]:
    """Return `rope_scaling` and `max_position_embeddings` as `ModelConfig` defines them.

    The inverse of `_rope_json`.
    """
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    if kind == "default":
        for key, value in rope.items():
            raise ModelError(
                f"{path}: rope_parameters.{key} = {short_json(value)} is not supported"
            )
        return {}
    if kind not in get_args(RopeKind):
        raise ModelError(
            f"{path}: rope_type = {short_json(kind)} is not supported; "
            f"supported are {', '.join(get_args(RopeKind))}"
        )
    factor = rope.get("factor")
    is_valid_context = isinstance(context, int) and abs(context) < 2**53
    if is_valid_context and isinstance(factor, int | float) and 1 <= factor <= 1e6:
        if kind == "linear":  # max_position_embeddings is the extended context
            rope["original_max_position_embeddings"] = max(1, round(context / factor))
        elif kind == "dynamic":  # max_position_embeddings is the original context
            rope["original_max_position_embeddings"] = context
            context = round(context * factor)
        else:
            rope.setdefault("original_max_position_embeddings", context)
    try:
        scaling = RopeScaling.model_validate(rope | {"rope_type": kind}, strict=True)
    except ValidationError as error:
        raise ModelError(f"{path}: {_first_error(error, 'rope_parameters')}") from error
    return {"rope_scaling": scaling, "max_position_embeddings": context}


def _first_error(error: ValidationError, prefix: str = "") -> str:
    """Format the first error of pydantic, with its key."""
    first = error.errors()[0]
    key = ".".join(map(str, (*([prefix] if prefix else []), *first["loc"]))) or "the configuration"
    if first["type"] == "extra_forbidden":
        return f"{key} = {short_json(first['input'])} is not supported"
    return f"{key}: {first['msg']}"


def short_json(value: Any) -> str:
    """Format a value as JSON of at most 80 characters, for messages."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"
