"""Read model directories: find them, check their weights against config.json, load them."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minimind.config.model import ModelConfig
from minimind.errors import ModelError, shell_words
from minimind.model.empty import empty_transformer
from minimind.model.hf_config import read_config, short_json
from minimind.model.transformer import Transformer

FLOATS = ("F32", "BF16", "F16", "F64")  # dtypes, as safetensors names them
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WEIGHTS_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def resolve_model_directory(path: Path) -> Path:
    """Return the model directory that `path` names: itself, or `model` in a run directory.

    Raises ModelError when there is none.
    """
    for directory in (path, path / "model"):
        if (directory / "config.json").is_file():
            return directory
    if not path.exists():
        raise ModelError(f"{path}: there is no such directory; give a model or run directory")
    for directory in (path, path / "adapter"):
        if (directory / "adapter_config.json").is_file():
            adapter = shell_words("--adapter", path)
            raise ModelError(
                f"{path} holds a LoRA adapter but no model: merge it into its base model with "
                f"`minimind merge MODEL {adapter} --out DIR`. Commands with the option --adapter "
                f"also accept the base model together with {adapter}"
            )
    if (path / "checkpoints").is_dir():
        raise ModelError(
            f"{path} is a run that has not finished, so it has no model yet; "
            "give the training command again to resume it"
        )
    raise ModelError(
        f"{path} is not a model directory: it has no config.json. A model directory holds "
        f"config.json, {_WEIGHTS} and tokenizer.json"
    )


def load_model(
    directory: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """Load a model. Raises ModelError when its tensors do not match its configuration."""
    config = read_config(directory)
    path = directory  # the file that is being read, for the message
    try:
        with contextlib.ExitStack() as stack:
            files: dict[str, Any] = {}  # tensor name -> the open file that holds it
            paths: dict[str, Path] = {}
            for path, indexed in _weight_files(directory).items():
                file = stack.enter_context(safe_open(path, framework="pt"))
                names = set(file.keys())
                if missing := sorted((indexed or names) - names):
                    raise ModelError(
                        f"{path}: the tensor {missing[0]} is missing, but {_INDEX} lists it"
                    )
                files |= dict.fromkeys(indexed or names, file)
                paths |= dict.fromkeys(indexed or names, path)
            path = directory / (_WEIGHTS if (directory / _WEIGHTS).is_file() else _INDEX)
            slices = {name: file.get_slice(name) for name, file in files.items()}
            model = _empty_model(path, config, len(slices))
            _check_tensors(path, model, slices)
            if model.lm_head is None and _HEAD in files:
                _check_tied(path, *(files[name].get_tensor(name) for name in (_HEAD, _EMBEDDING)))
        tensors = {n: _read_tensor(paths[n], n).to(device, dtype) for n in model.state_dict()}
    except (SafetensorError, OSError) as error:
        raise unreadable_weights(path, error) from error
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(True)


def check_weights(directory: Path) -> None:
    """Raise ModelError if a weight file is missing or truncated."""
    for path in _weight_files(directory):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise unreadable_weights(path, error) from error


def unreadable_weights(path: Path, error: Exception) -> ModelError:
    """Return the error for a weight file that is damaged."""
    return ModelError(f"{path}: cannot be read as safetensors: {error}; copy it again")


def _read_tensor(path: Path, name: str) -> Tensor:
    """Read one tensor. Opening the file for each frees its memory map with the tensor."""
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def stored_dtype(directory: Path) -> str:
    """Return the torch dtype in which the weights are stored: that of the embedding.

    float64 counts as float32. Raises ModelError when there are no weights.
    """
    for path, indexed in _weight_files(directory).items():
        with safe_open(path, framework="pt") as file:
            if _EMBEDDING in (indexed or set(file.keys())):
                stored = file.get_slice(_EMBEDDING).get_dtype()
                return {"BF16": "bfloat16", "F16": "float16"}.get(stored, "float32")
    raise ModelError(f"{directory}: its weights have no {_EMBEDDING}")


def _weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """Return the weight files and the tensors to read from each; None means all of them.

    Raises ModelError when there are none, or when the index names a file outside the directory.
    """
    if (directory / _WEIGHTS).is_file():
        return {directory / _WEIGHTS: None}
    index = directory / _INDEX
    if not index.is_file():
        raise ModelError(
            f"{directory}: there is no {_WEIGHTS}; other weight formats are not supported"
        )
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        tensors_of: dict[str, set[str]] = {}
        for tensor, name in weight_map.items():
            tensors_of.setdefault(name, set()).add(tensor)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not a valid index of weights; copy it again") from error
    files: dict[Path, set[str] | None] = {}
    for name, tensors in tensors_of.items():
        if not _WEIGHTS_NAME.fullmatch(str(name)):
            raise ModelError(
                f"{index}: {short_json(name)} is not the name of a safetensors file in the same "
                "directory"
            )
        if not (directory / name).is_file():
            raise ModelError(f"{directory}: {name}, which {_INDEX} names, is missing; copy it too")
        files[directory / name] = tensors
    return files


def _empty_model(path: Path, config: ModelConfig, num_tensors: int) -> Transformer:
    """Build the model on the meta device, so that huge sizes in config.json allocate nothing."""
    if config.num_hidden_layers > num_tensors:
        raise ModelError(
            f"{path}: config.json says {config.num_hidden_layers:,} layers, "
            "but the weights have fewer"
        )
    try:
        return empty_transformer(config)
    except (RuntimeError, TypeError) as error:  # the number of elements exceeds int64
        raise ModelError(f"{path}: the sizes in config.json are too large for any file") from error


def _check_tensors(path: Path, model: Transformer, slices: dict[str, Any]) -> None:
    """Raise ModelError if names, shapes or dtypes in the file are not those of the model."""
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    # Some files store a tied head twice. Old ones also store the RoPE frequencies, which follow
    # from the configuration.
    extra = slices.keys() - expected.keys() - {_HEAD}
    extra = {name for name in extra if not name.endswith("rotary_emb.inv_freq")}
    missing = expected.keys() - slices.keys()
    for problem, names in (("lacks", missing), ("has unknown tensors:", extra)):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (" …" if len(names) > 3 else "")
            raise ModelError(f"{path} {problem} {listed}; it does not match its config.json")
    for name, shape in expected.items():
        if slices[name].get_shape() != shape:
            raise ModelError(
                f"{path}: {name} has the shape {slices[name].get_shape()}, "
                f"but config.json says {shape}"
            )
        check_dtype(path, name, slices[name])


def check_dtype(path: Path, name: str, tensor_slice: Any) -> None:
    """Raise ModelError for a tensor that does not hold floating-point numbers."""
    if (dtype := tensor_slice.get_dtype()) not in FLOATS:
        raise ModelError(f"{path}: {name} has the dtype {dtype}; supported are {', '.join(FLOATS)}")


def _check_tied(path: Path, head: Tensor, embedding: Tensor) -> None:
    """Raise ModelError for a stored head that differs from the embedding it should be tied to."""
    if not torch.equal(head.to(embedding.dtype), embedding):
        raise ModelError(
            f"{path}: {_HEAD} differs from {_EMBEDDING}, but config.json says that they are tied "
            "(tie_word_embeddings); set it to false there to use both, or remove the head"
        )
