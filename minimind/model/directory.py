"""Model directories: the layout that transformers, vLLM, llama.cpp's tools and peft all read."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minimind.config.model import ModelConfig
from minimind.errors import ModelError, ResourceError
from minimind.model.transformer import Transformer

_MODEL_TYPES = {"llama": False, "qwen3": True}  # and whether it has QK-norm


class SavesItself(Protocol):
    """What is needed of a tokenizer here."""

    @property
    def im_end(self) -> int: ...
    @property
    def end_of_text(self) -> int: ...
    def save(self, directory: Path) -> None: ...


def resolve_model_directory(path: Path) -> Path:
    """The model directory that `path` means: itself, or the `model` of a run directory.

    Raises ModelError when there is none.
    """
    for place in (path, path / "model"):
        if (place / "config.json").is_file():
            return place
    if not path.exists():
        raise ModelError(f"{path}: there is no such directory; give a model or run directory")
    if (path / "checkpoints").is_dir():
        raise ModelError(
            f"{path} is a run that has not finished, so it has no model yet; "
            "give the training command again to go on with it"
        )
    raise ModelError(
        f"{path} is not a model directory: it has no config.json. A model directory holds "
        "config.json, model.safetensors and tokenizer.json"
    )


def save_model(
    directory: Path, model: Transformer, tokenizer: SavesItself, *, dtype: str = "float32"
) -> None:
    """Write a model directory, whole or not at all; one that is there is replaced.

    Raises ResourceError when it cannot be written.
    """
    size = sum(p.numel() for p in model.parameters()) * getattr(torch, dtype).itemsize
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    except OSError as error:
        raise ResourceError(f"{directory}: cannot be written ({error.strerror})") from error
    try:
        work.chmod(0o755)
        tensors = {
            name: tensor.detach().to("cpu", getattr(torch, dtype)).contiguous()
            for name, tensor in model.state_dict().items()
        }
        save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
        _write_json(work / "config.json", _config_json(model.config, tokenizer, dtype))
        _write_json(
            work / "generation_config.json",
            {
                "do_sample": True,
                "temperature": 0.7,
                "top_p": 0.9,
                "eos_token_id": [tokenizer.im_end, tokenizer.end_of_text],
                "pad_token_id": tokenizer.end_of_text,
            },
        )
        tokenizer.save(work)
        old = Path(tempfile.mkdtemp(prefix=f".{directory.name}-old-", dir=directory.parent))
        if directory.exists():
            os.replace(directory, old / "model")
        os.replace(work, directory)
        shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"{directory}: the model could not be written ({error}); it needs {size:,} bytes, "
            f"and {shutil.disk_usage(directory.parent).free:,} are free"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config_json(config: ModelConfig, tokenizer: SavesItself, dtype: str) -> dict[str, Any]:
    shape = config.model_dump(exclude={"qk_norm", "rope_theta"})
    return shape | {
        "architectures": [config.architecture],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        # transformers 5 reads the first of each pair, older tools the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "dtype": dtype,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": tokenizer.im_end,
        "pad_token_id": tokenizer.end_of_text,
    }


def read_config(directory: Path) -> ModelConfig:
    """The shape that `config.json` describes. Raises ModelError for what this code cannot run."""
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text("utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as a model's configuration: {error}") from error
    kind = raw.get("model_type")
    if kind not in _MODEL_TYPES:
        raise ModelError(
            f"{path}: model_type {kind!r} is not supported; {' and '.join(_MODEL_TYPES)} are"
        )
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ModelError(f"{path}: rope_parameters is not an object")
    unsupported = {
        "rope_scaling": raw.get("rope_scaling"),
        "rope_parameters.rope_type": rope.get("rope_type", "default") != "default",
        "attention_bias": raw.get("attention_bias"),
        "mlp_bias": raw.get("mlp_bias"),
        "sliding_window": raw.get("use_sliding_window") and raw.get("sliding_window"),
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
    }
    for key, is_set in unsupported.items():
        if is_set:
            raise ModelError(f"{path}: {key} is set to something that is not supported here")
    fields = {key: raw[key] for key in ModelConfig.model_fields if raw.get(key) is not None}
    fields["qk_norm"] = _MODEL_TYPES[kind]
    fields["tie_word_embeddings"] = raw.get("tie_word_embeddings", False)
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    if theta is not None:
        fields["rope_theta"] = theta
    fields.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
    if fields.get("hidden_size") and fields.get("num_attention_heads") and kind == "llama":
        fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    required = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
    required |= {"num_attention_heads", "head_dim"}
    if missing := sorted(required - fields.keys()):
        raise ModelError(f"{path}: {', '.join(missing)} missing")
    try:
        return ModelConfig(**fields)
    except (ValidationError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        raise ModelError(f"{path}: {what}") from error


def load_model(
    directory: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """Read a model directory. Raises ModelError when its tensors do not fit its configuration."""
    config = read_config(directory)
    path = directory / "model.safetensors"
    if not path.is_file():
        sharded = (directory / "model.safetensors.index.json").is_file()
        raise ModelError(
            f"{directory}: "
            + ("sharded weights are not supported; save" if sharded else "there is no")
            + " model.safetensors"
            + (" as one file" if sharded else "; weights of other kinds are not read")
        )
    try:
        with safe_open(path, framework="pt") as file:
            _check_shapes(path, config, {k: file.get_slice(k).get_shape() for k in file.keys()})  # noqa: SIM118
            with torch.device("meta"):
                model = Transformer(config)
            tensors = {name: file.get_tensor(name).to(device, dtype) for name in _names(model)}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(True)


def _names(model: Transformer) -> list[str]:
    return list(model.state_dict())


def _check_shapes(path: Path, config: ModelConfig, found: dict[str, list[int]]) -> None:
    """Compare names and shapes before anything is allocated: a hostile config costs nothing."""
    number = config.num_hidden_layers
    if number > len(found):
        raise ModelError(f"{path}: config.json promises {number} layers; the file has fewer")
    with torch.device("meta"):
        wanted = {n: list(t.shape) for n, t in Transformer(config).state_dict().items()}
    # A tied head is sometimes stored a second time; the embedding is what counts.
    extra = found.keys() - wanted.keys() - {"lm_head.weight"}
    missing = wanted.keys() - found.keys()
    for what, names in (("lacks", missing), ("has unknown tensors:", extra)):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (" …" if len(names) > 3 else "")
            raise ModelError(f"{path} {what} {listed}; it does not belong to its config.json")
    for name, shape in wanted.items():
        if list(found[name]) != shape:
            raise ModelError(
                f"{path}: {name} has the shape {list(found[name])}, config.json says {shape}"
            )
