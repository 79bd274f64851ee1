"""LoRA adapter files, in the format of peft: save them, and merge them into a model.

    RUN/adapter/adapter_config.json        rank, alpha, target modules
                adapter_model.safetensors  lora_A [rank, in] and lora_B [out, rank] per module

In memory the matrices are `<module>.lora_A` and `<module>.lora_B`; peft calls them
`base_model.model.<module>.lora_A.weight`. Adapters that use more of peft than plain LoRA are
refused, and the message names the feature.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minimind.config.settings import LoRASettings
from minimind.errors import ModelError
from minimind.files import read_json_object
from minimind.model.directory import check_dtype
from minimind.model.lora import adapted_modules
from minimind.model.saving import atomic_directory, write_hf_json
from minimind.model.transformer import Transformer

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MATRICES = ("lora_A", "lora_B")
# Keys of adapter_config.json that do not change what is computed here.
_IGNORED_KEYS = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "layers_pattern",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}
_SUPPORTED_KEYS = {
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
}
# Values of init_lora_weights that leave the base weights unchanged.
_SUPPORTED_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
_MAX_QUANTIFIERS = 4  # in a regular expression, so that it cannot backtrack for hours


def save_adapter(directory: Path, model: Transformer, settings: LoRASettings, base: Path) -> None:
    """Write the adapter of a model adapted by `apply_lora`, atomically.

    Raises ResourceError when it cannot be written, ModelError when `directory` holds something
    else or is the current folder.
    """
    tensors = {
        _tensor_name(name, matrix): getattr(module, matrix).detach().cpu().contiguous()
        for name, module in adapted_modules(model)
        for matrix in _MATRICES
    }
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.resolve()),
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": sorted({_peft_target(name) for name, _ in adapted_modules(model)}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with atomic_directory(directory, "LoRA adapter", _CONFIG, size) as work:
        save_file(tensors, work / _WEIGHTS, metadata={"format": "pt"})
        write_hf_json(work / _CONFIG, config)


def _peft_target(name: str) -> str:
    """Return a module's name for `target_modules`.

    Routed experts also have an `input_linear`, so that of shared experts is named with its parent.
    """
    parent, leaf = name.split(".")[-2:]
    return f"{parent}.{leaf}" if parent == "shared_mlp" else leaf


def resolve_adapter_directory(path: Path) -> Path:
    """Return the adapter directory that `path` names: itself, or `adapter` in a run directory.

    Raises ModelError when there is none.
    """
    for directory in (path, path / "adapter"):
        if (directory / _CONFIG).is_file():
            return directory
    if not path.exists():
        raise ModelError(f"{path}: there is no such directory; give an adapter or run directory")
    raise ModelError(
        f"{path} is not a LoRA adapter: it has no {_CONFIG}. `minimind lora` trains one; "
        "a run directory contains it once the run has finished"
    )


@torch.no_grad()
def merge_adapter(model: Transformer, directory: Path) -> None:
    """Add an adapter, trained here or by peft, to the weights of its base model, in place.

    Computed in float32. Raises ModelError as `adapter_matrices` does.
    """
    for name, a, b, scale in adapter_matrices(model, directory):
        weight = model.get_parameter(f"{name}.weight")
        merged = weight.float() + (scale * (b @ a)).to(weight.device)
        weight.copy_(merged)


def adapter_matrices(
    model: Transformer, directory: Path
) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Yield (module, A [r, in], B [out, r], scale) of an adapter, in float32; W + scale · B A.

    Raises ModelError for an adapter that is damaged, that uses more than plain LoRA, or that
    belongs to another model.
    """
    config = _read_config(directory)
    path = directory / _WEIGHTS
    if not path.is_file():
        raise ModelError(
            f"{directory}: there is no {_WEIGHTS}; other weight formats are not supported"
        )
    try:
        with safe_open(path, framework="pt") as file:
            for name in _check_tensors(path, model, config, file):
                a, b = (file.get_tensor(_tensor_name(name, m)).float() for m in _MATRICES)
                yield name, a, b, _scale(config, name)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: cannot be read as safetensors: {error}; copy it again"
        ) from error


def _tensor_name(module: str, matrix: str) -> str:
    return f"{_PREFIX}{module}.{matrix}.weight"


def _read_config(directory: Path) -> dict[str, Any]:
    """Read adapter_config.json. Raises ModelError for features that are not supported."""
    path = directory / _CONFIG
    try:
        raw = read_json_object(path)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as a LoRA configuration: {error}") from error
    peft_type = raw.get("peft_type")
    if peft_type != "LORA":
        raise ModelError(f"{path}: peft_type {peft_type!r} is not supported; only LORA is")
    unsupported = [
        key for key in raw.keys() - _IGNORED_KEYS - _SUPPORTED_KEYS if not _is_unset(raw[key])
    ]
    if raw.get("bias", "none") != "none":
        unsupported.append("bias")
    init = raw.get("init_lora_weights")
    if not any(init is supported or init == supported for supported in _SUPPORTED_INITS):
        unsupported.append("init_lora_weights")
    if unsupported:
        raise ModelError(
            f"{path}: {', '.join(sorted(unsupported))}: not supported; merge the adapter with "
            "peft (merge_and_unload) and give the merged model"
        )
    return _validated_config(path, raw)


def _is_unset(value: object) -> bool:
    """Return True if peft treats the value as "not set". 0 is a value: it may be a layer index."""
    return value is None or value is False or value in ([], {}, "")


def _validated_config(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Return the supported keys with peft's defaults. Raises ModelError for invalid values."""
    config = {
        "r": raw.get("r", 8),
        "lora_alpha": raw.get("lora_alpha", 8),
        "target_modules": raw.get("target_modules"),
        "use_rslora": raw.get("use_rslora") or False,
        "rank_pattern": raw.get("rank_pattern") or {},
        "alpha_pattern": raw.get("alpha_pattern") or {},
    }
    targets = config["target_modules"]
    is_name_list = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    checks = {
        "r": _is_rank(config["r"]),
        "lora_alpha": _is_number(config["lora_alpha"]),
        "target_modules": bool(targets) and (is_name_list or isinstance(targets, str)),
        "use_rslora": isinstance(config["use_rslora"], bool),
        "rank_pattern": _is_dict_of(config["rank_pattern"], _is_rank),
        "alpha_pattern": _is_dict_of(config["alpha_pattern"], _is_number),
    }
    for key, is_valid in checks.items():
        if not is_valid:
            raise ModelError(f"{path}: {key} is missing or has an invalid value")
    patterns = [*config["rank_pattern"], *config["alpha_pattern"]]
    for pattern in [*patterns, *([targets] if isinstance(targets, str) else [])]:
        if not _is_safe_pattern(pattern):
            raise ModelError(
                f"{path}: the pattern {pattern[:80]!r} is invalid or too complex to match quickly"
            )
    return config


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 20


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # type: ignore[arg-type]


def _is_dict_of(value: object, is_valid: Any) -> bool:
    return isinstance(value, dict) and all(map(is_valid, value.values()))


def _is_safe_pattern(pattern: str) -> bool:
    """Return True if a regular expression is valid and has few quantifiers, none nested."""
    num_quantifiers = len(re.findall(r"[*+{]", pattern))
    is_simple = len(pattern) < 1000 and num_quantifiers <= _MAX_QUANTIFIERS
    try:
        return is_simple and not re.search(r"\)[*+{]", pattern) and bool(re.compile(pattern))
    except (re.error, RecursionError, OverflowError):
        return False


def _check_tensors(
    path: Path, model: Transformer, config: dict[str, Any], file: Any
) -> dict[str, nn.Linear]:
    """Return the modules to merge into, by name.

    Raises ModelError when the tensors of the file do not match the model and the configuration.
    """
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    modules = {name: m for name, m in linear.items() if _is_target(name, config["target_modules"])}
    expected: dict[str, list[int]] = {}
    for name, module in modules.items():
        rank = _by_pattern(config["rank_pattern"], name, config["r"])
        expected[_tensor_name(name, "lora_A")] = [rank, module.in_features]
        expected[_tensor_name(name, "lora_B")] = [module.out_features, rank]
    for module_name in ("embed_tokens", "lm_head"):
        if any(module_name in name.split(".") for name in slices.keys() - expected.keys()):
            raise ModelError(
                f"{path}: it changes {module_name}, which is not supported; merge the adapter with "
                "peft (merge_and_unload) and give the merged model"
            )
    if not expected:
        raise ModelError(f"{path}: the model has none of the modules that the adapter changes")
    unknown, missing = slices.keys() - expected.keys(), expected.keys() - slices.keys()
    for problem, names in (("lacks", missing), ("has tensors that the model lacks:", unknown)):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (" …" if len(names) > 3 else "")
            raise ModelError(f"{path} {problem} {listed}; it belongs to another model")
    for name, shape in expected.items():
        if slices[name].get_shape() != shape:
            raise ModelError(
                f"{path}: {name} has the shape {slices[name].get_shape()}, but the model and the "
                f"adapter's rank need {shape}; it belongs to another model"
            )
        check_dtype(path, name, slices[name])
    return modules


def _is_target(name: str, targets: str | list[str]) -> bool:
    """Return True if peft adapts the module. targets: names, suffixes or a regular expression."""
    if targets in ("all-linear", ["all-linear"]):
        return name != "lm_head" and not name.endswith("router.layer")
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _scale(config: dict[str, Any], name: str) -> float:
    """Return alpha / rank of a module, or alpha / sqrt(rank) with rsLoRA."""
    rank = _by_pattern(config["rank_pattern"], name, config["r"])
    alpha: float = _by_pattern(config["alpha_pattern"], name, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def _by_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the module's name or a suffix of it."""
    matches = (v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(matches, default)
