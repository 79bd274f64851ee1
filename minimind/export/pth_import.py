"""`.pth` weights of the public MiniMind project to a model directory.

A `.pth` file holds tensors but no configuration. Sizes follow from the shapes of the tensors; the
rest (heads, RoPE base, context, epsilon, experts per token) comes from KEY=VALUE settings, from
MiniMind's JSON configuration beside the file, or from the defaults of its generation, and
`ImportReport` names which.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from minimind.config.model import ModelConfig
from minimind.errors import ModelError, UsageError
from minimind.export.pth_layout import (
    V3,
    Generation,
    halves_from_pairs,
    identify,
    join_experts,
    new_name,
)
from minimind.files import read_json_object
from minimind.model import Transformer, save_model
from minimind.model.empty import empty_transformer
from minimind.model.saving import check_new_directory
from minimind.tokenizer import Tokenizer

# Settings that tensors do not show, with the older names.
SETTINGS = (
    "num_attention_heads",
    "max_position_embeddings",
    "rope_theta",
    "rms_norm_eps",
    "num_experts_per_tok",
)
_OLD_SETTINGS = {
    "n_heads": "num_attention_heads",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
}
# Settings of MiniMind that change the computation: the values that can be represented.
_SUPPORTED_VALUES = {
    "hidden_act": ("silu",),
    "scoring_func": ("softmax",),
    "norm_topk_prob": (True,),
    "inference_rope_scaling": (False,),
}
# Tables that older versions of MiniMind stored with the weights. They follow from the settings.
_BUFFERS = ("pos_cis", "freqs_cos", "freqs_sin", "mask")
_ATTENTION = "model.layers.0.self_attn"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class ImportReport:
    """The result of an import. settings: (name, value, where the value comes from)."""

    generation: str
    num_parameters: int = 0
    dtype: str = "float32"
    settings: list[tuple[str, Any, str]] = field(default_factory=list)


def import_pth(
    path: Path, out: Path, tokenizer: Tokenizer, overrides: Mapping[str, Any] | None = None
) -> ImportReport:
    """Write the weights in `path` as the new model directory `out`.

    overrides: values of SETTINGS. Raises ModelError for a file that holds anything but tensors,
    and for a model that no supported class of transformers computes; UsageError for an unknown
    setting, and when `out` is not empty; TokenizerError when the tokenizer does not fit;
    ResourceError when `out` cannot be written.
    """
    check_new_directory(out)
    if unknown := sorted((overrides or {}).keys() - set(SETTINGS)):
        raise UsageError(f"no setting {unknown[0]!r}; known are {', '.join(SETTINGS)}")
    state = read_state(path)
    generation = identify(state)
    if generation is None:
        raise ModelError(_not_minimind(path, state))
    if generation.has_old_names:
        state = {new_name(name): tensor for name, tensor in state.items()}
    report = ImportReport(generation.name, dtype=_common_dtype(path, state))
    config = _resolve_config(path, state, generation, overrides or {}, report)
    tokenizer.check_model(path, config.vocab_size)
    if generation.has_old_names:
        _reorder_heads(state, config)
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    try:
        for layer in range(config.num_hidden_layers if config.num_local_experts else 0):
            shared = config.shared_intermediate_size // config.intermediate_size
            join_experts(state, layer, config.num_local_experts, shared)
    except KeyError as error:
        raise ModelError(f"{path} lacks {error.args[0]}") from None
    model = _build_model(path, config, state)
    report.num_parameters = sum(parameter.numel() for parameter in model.parameters())
    save_model(out, model, tokenizer, dtype=report.dtype)
    return report


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running any code that the file may hold.

    A checkpoint of MiniMind's trainer, {"model": state dict, "optimizer": …}, counts as its state
    dict. Tables that follow from the settings are left out. Raises ModelError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of damaged files
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damaged bytes raise errors of many types in the unpickler
        if match := re.search(r"\bGLOBAL ([\w.]+)", str(error)):
            raise ModelError(
                f"{path}: it holds more than tensors: {match[1]}, which could run code. Nothing "
                "was run. Save the weights alone in the program that wrote the file: "
                "torch.save(model.state_dict(), FILE)"
            ) from error
        raise ModelError(
            f"{path}: cannot be read as a file of torch.save; nothing in it was run. Copy it again"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not content:
        raise ModelError(f"{path}: it holds no state dict, but {type(content).__name__}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ModelError(f"{path}: {name!r} is not a named tensor; save the state dict alone")
    return {
        name.removeprefix("_orig_mod."): tensor  # a prefix of torch.compile
        for name, tensor in content.items()
        if name.rsplit(".", 1)[-1] not in _BUFFERS
    }


def _not_minimind(path: Path, state: Mapping[str, Tensor]) -> str:
    if any(".lora." in name for name in state):
        return (
            f"{path}: it holds LoRA matrices without their model; merge them in MiniMind "
            "(convert_merge_base_lora in scripts/convert_model.py) and import the result"
        )
    return (
        f"{path}: its tensors are not MiniMind's ({', '.join(sorted(state)[:3])} …); "
        "imported are state dicts of MiniMind v1, v2 and v3"
    )


def _common_dtype(path: Path, state: Mapping[str, Tensor]) -> str:
    """Return the dtype to store: that of the tensors, or float32, which holds both others."""
    for name, tensor in state.items():
        if tensor.dtype not in _DTYPES:
            names = ", ".join(_dtype_name(dtype) for dtype in _DTYPES)
            raise ModelError(f"{path}: {name} has the dtype {tensor.dtype}; supported are {names}")
    dtypes = {tensor.dtype for tensor in state.values()}
    return _dtype_name(dtypes.pop()) if len(dtypes) == 1 else "float32"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _resolve_config(
    path: Path,
    state: Mapping[str, Tensor],
    generation: Generation,
    overrides: Mapping[str, Any],
    report: ImportReport,
) -> ModelConfig:
    """Return the configuration of the model and record in `report` where values come from."""
    source, stored = _stored_config(path)
    sizes = _sizes(path, state)
    is_moe = sizes["num_local_experts"] > 0
    for name in SETTINGS:
        if name == "num_experts_per_tok" and not is_moe:
            continue
        if name == "num_attention_heads" and generation is V3:  # q_norm has the width of a head
            head_dim = len(_require(path, state, f"{_ATTENTION}.q_norm.weight"))
            sizes[name] = len(_require(path, state, f"{_ATTENTION}.q_proj.weight")) // head_dim
            continue
        if name in overrides:
            value, origin = overrides[name], "given"
        elif stored.get(name) is not None:
            value, origin = stored[name], str(source)
        else:
            value, origin = getattr(generation, name), f"default of {generation.name}"
        report.settings.append((name, value, origin))
        sizes[name] = value
    _add_head_sizes(path, state, sizes)
    _check_stored(source, stored, sizes)
    _check_representable(path, generation, sizes)
    try:
        return ModelConfig.model_validate(sizes)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ModelError(f"{path}: {name}{': ' if name else ''}{first['msg']}") from None


def _stored_config(path: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return MiniMind's configuration beside the file, with the newer names of its settings."""
    for source in (path.with_suffix(".json"), path.with_name("config.json")):
        if not source.is_file():
            continue
        try:
            content = read_json_object(source)
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{source}: cannot be read as a configuration: {error}") from error
        if content.get("model_type") == "minimind":
            return source, {_OLD_SETTINGS.get(name, name): v for name, v in content.items()}
    return None, {}


def _sizes(path: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings that follow from the shapes of tensors. Raises ModelError."""
    layers = {name.split(".")[2] for name in state if name.startswith("model.layers.")}
    mlp = "model.layers.0.mlp"
    routed, shared = (
        len({name for name in state if name.startswith(f"{mlp}.{kind}.") and "gate" in name})
        for kind in ("experts", "shared_experts")
    )
    first = f"{mlp}.experts.0" if routed else mlp
    vocab_size, hidden_size = _require(path, state, "model.embed_tokens.weight").shape
    intermediate_size = len(_require(path, state, f"{first}.gate_proj.weight"))
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": len(layers),
        "num_local_experts": routed,
        "shared_intermediate_size": shared * intermediate_size,
        "qk_norm": f"{_ATTENTION}.q_norm.weight" in state,
        "tie_word_embeddings": _is_tied(state),
    }


def _require(path: Path, state: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a tensor; raise ModelError if it is missing or a number."""
    if name not in state or state[name].ndim != (1 if "norm" in name else 2):
        raise ModelError(f"{path} lacks the {'vector' if 'norm' in name else 'matrix'} {name}")
    return state[name]


def _is_tied(state: Mapping[str, Tensor]) -> bool:
    head = state.get("lm_head.weight")
    return head is None or torch.equal(head, state["model.embed_tokens.weight"])


def _add_head_sizes(path: Path, state: Mapping[str, Tensor], sizes: dict[str, Any]) -> None:
    """Add head_dim and the number of key/value heads. Raises ModelError if heads do not fit."""
    heads = sizes["num_attention_heads"]
    rows, key_rows = (
        len(_require(path, state, f"{_ATTENTION}.{matrix}_proj.weight")) for matrix in ("q", "k")
    )
    if not isinstance(heads, int) or heads < 1 or rows % heads or key_rows % (rows // heads):
        raise ModelError(
            f"{path}: num_attention_heads = {heads} does not divide its {rows} query and "
            f"{key_rows} key rows; give the number of heads: num_attention_heads=N"
        )
    sizes["head_dim"] = rows // heads
    sizes["num_key_value_heads"] = key_rows // sizes["head_dim"]


def _check_stored(source: Path | None, stored: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Raise ModelError where MiniMind's configuration contradicts the tensors or is unsupported."""
    for name, value in sizes.items():
        is_size = name not in SETTINGS and name != "tie_word_embeddings"
        if is_size and stored.get(name) is not None and stored[name] != value:
            raise ModelError(f"{source}: {name} is {stored[name]}, but the tensors have {value}")
    for name, values in _SUPPORTED_VALUES.items():
        if stored.get(name) is not None and stored[name] not in values:
            raise ModelError(
                f"{source}: {name} = {stored[name]!r} cannot be represented; only {values[0]!r} can"
            )


def _check_representable(path: Path, generation: Generation, sizes: Mapping[str, Any]) -> None:
    """Raise ModelError for a model that no supported class of transformers computes."""
    is_moe = sizes["num_local_experts"] > 0
    if is_moe and generation is V3:
        raise ModelError(
            f"{path}: a mixture of experts (mlp.experts, mlp.gate) with RMSNorm of queries and "
            "keys (self_attn.q_norm, self_attn.k_norm). GraniteMoeSharedForCausalLM, the class of "
            "mixtures here, has no such norm. MiniMind's own scripts/convert_model.py writes this "
            "model as Qwen3MoeForCausalLM, which transformers runs and `minimind eval` evaluates"
        )
    if is_moe and sizes["num_experts_per_tok"] == 1:
        raise ModelError(
            f"{path}: num_experts_per_tok = 1: {generation.name} multiplies the output of the "
            "expert by its probability, GraniteMoeSharedForCausalLM by 1"
        )
    if not sizes["tie_word_embeddings"] and generation is not V3:
        raise ModelError(
            f"{path}: its output head (lm_head or output) differs from its embedding "
            f"(embed_tokens or tok_embeddings), but {generation.name} ties them; copy it again"
        )


def _reorder_heads(state: dict[str, Tensor], config: ModelConfig) -> None:
    """Convert queries and keys from the RoPE layout of older weights, in place."""
    for layer in range(config.num_hidden_layers):
        for matrix, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            name = f"model.layers.{layer}.self_attn.{matrix}.weight"
            if name in state:
                state[name] = halves_from_pairs(state[name], heads)


def _build_model(path: Path, config: ModelConfig, state: dict[str, Tensor]) -> Transformer:
    """Return a model with the tensors of `state`. Raises ModelError when they do not match it."""
    model = empty_transformer(config)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for problem, names in (
        ("lacks", expected.keys() - state.keys()),
        ("has tensors that no supported class has:", state.keys() - expected.keys()),
    ):
        if names:
            listed = ", ".join(sorted(names)[:5]) + (" …" if len(names) > 5 else "")
            raise ModelError(f"{path} {problem} {listed}")
    for name, shape in expected.items():
        if list(state[name].shape) != shape:
            raise ModelError(
                f"{path}: {name} has the shape {list(state[name].shape)}; the other tensors and "
                f"settings need {shape}"
            )
    model.load_state_dict(state, assign=True)
    return model
