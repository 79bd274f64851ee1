"""Model directories: the layout that transformers, vLLM, llama.cpp's tools and peft all read."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minimind.config.model import MOE_FIELDS, ModelConfig, RopeKind, RopeScaling
from minimind.errors import ModelError, ResourceError, shell_words
from minimind.model.transformer import Transformer

_MOE_TYPES = ("granitemoeshared", "granitemoe")  # the second has no shared experts
_MODEL_TYPES = ("llama", "qwen3", *_MOE_TYPES)
_INDEX = "model.safetensors.index.json"
_PLAIN_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FLOATS = ("F32", "BF16", "F16", "F64")  # as safetensors calls them


def is_stray(name: str) -> bool:
    """True for a file that file managers and network disks leave in folders: .DS_Store, .nfs…"""
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini")


def is_empty(directory: Path) -> bool:
    """True if a directory holds nothing but stray files."""
    return all(is_stray(file.name) for file in directory.iterdir())


def flush(path: Path) -> None:
    """Ask the system to put a file, or a directory's list of names, on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows flushes names by itself
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class SavesItself(Protocol):
    """What is needed of a tokenizer here."""

    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    @property
    def end_of_text(self) -> int: ...
    @property
    def model_ids(self) -> dict[str, Any]: ...
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
    for place in (path, path / "adapter"):
        if (place / "adapter_config.json").is_file():
            adapter = shell_words("--adapter", path)
            raise ModelError(
                f"{path} holds a LoRA adapter and no model of its own: give the model that it was "
                f"made for, with {adapter}, or make one of both with "
                f"`minimind merge MODEL {adapter} --out DIR`"
            )
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
    """Write a model directory, whole or not at all; a model that is there is replaced.

    Raises ResourceError when it cannot be written, ModelError when something else is there.
    """
    size = sum(p.numel() for p in model.parameters()) * getattr(torch, dtype).itemsize
    with write_atomically(directory, "model", "config.json", size) as work:
        tensors = {
            name: tensor.detach().to("cpu", getattr(torch, dtype)).contiguous()
            for name, tensor in model.state_dict().items()
        }
        save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
        write_json(work / "config.json", _config_json(model.config, tokenizer, dtype))
        write_json(
            work / "generation_config.json",
            {
                "do_sample": True,
                "temperature": 0.7,
                "top_p": 0.9,
                "eos_token_id": list(tokenizer.stop_ids),
                "pad_token_id": tokenizer.end_of_text,
            },
        )
        tokenizer.save(work)


@contextlib.contextmanager
def write_atomically(directory: Path, kind: str, mark: str, size: int) -> Iterator[Path]:
    """A folder to write into, which then becomes `directory`; on an error nothing has changed.

    Its files are on the disk, not in a cache, before it takes that name.

    What is there is replaced if it has the file `mark`, by which its `kind` is known, or is
    empty.
    Raises ModelError when something else is there, ResourceError, which says that `size` bytes
    are needed, when it cannot be written.
    """
    if directory.is_file() or (directory.is_dir() and not _may_replace(directory, mark)):
        raise ModelError(f"{directory} is there and is not a {kind}; give another directory")
    # Fixed names, so that what a killed process left is found and swept up here.
    work, old = (directory.with_name(f".{directory.name}.{part}") for part in ("new", "old"))
    try:
        _put_back(old, directory)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        yield work
        for file in work.rglob("*"):
            flush(file)
        flush(work)
        if directory.exists():
            os.replace(directory, old)
        os.replace(work, directory)
        flush(directory.parent)
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"{directory}: the {kind} could not be written ({error}); it needs {size:,} bytes"
            + _free_space(directory)
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _put_back(old, directory)


def _put_back(old: Path, directory: Path) -> None:
    """Remove the model that was replaced, unless there is no other."""
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        os.replace(old, directory)


def _may_replace(directory: Path, mark: str) -> bool:
    return (directory / mark).is_file() or is_empty(directory)


def _free_space(directory: Path) -> str:
    there = next((place for place in directory.absolute().parents if place.is_dir()), None)
    return f", and {shutil.disk_usage(there).free:,} are free" if there else ""


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config_json(config: ModelConfig, tokenizer: SavesItself, dtype: str) -> dict[str, Any]:
    scaling, context = _rope_json(config)
    shape = config.model_dump(exclude={"qk_norm", "rope_theta", "rope_scaling", *MOE_FIELDS})
    kind = "qwen3" if config.qk_norm else "llama"
    if config.num_local_experts:
        kind = _MOE_TYPES[0]
        shape |= config.model_dump(include=set(MOE_FIELDS))
        # Left out, it would be 1 in transformers.
        shape["attention_multiplier"] = config.attention_multiplier or config.head_dim**-0.5
    return (
        shape
        | {
            "architectures": [config.architecture],
            "model_type": kind,
            "max_position_embeddings": context,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "use_cache": True,
            # transformers 5 reads the first of each pair, older tools the second.
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta} | scaling,
            "rope_theta": config.rope_theta,
            "rope_scaling": scaling or None,
            "dtype": dtype,
            "torch_dtype": dtype,
        }
        | tokenizer.model_ids
    )


def _rope_json(config: ModelConfig) -> tuple[dict[str, Any], int]:
    """The scaling and `max_position_embeddings` as transformers understands them.

    It takes `max_position_embeddings` for the original context under dynamic scaling, and knows no
    key for it under linear scaling, which needs none.
    """
    scaling = config.rope_scaling
    if scaling is None:
        return {}, config.max_position_embeddings
    written = scaling.model_dump(exclude_none=True)
    if scaling.rope_type == "dynamic":
        return written, written.pop("original_max_position_embeddings")
    if scaling.rope_type == "linear":
        del written["original_max_position_embeddings"]
    return written, config.max_position_embeddings


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
    if not isinstance(kind, str) or kind not in _MODEL_TYPES:
        raise ModelError(
            f"{path}: model_type {kind!r} is not supported; {', '.join(_MODEL_TYPES)} are"
        )
    rope = _rope_parameters(path, raw)
    _check_supported(path, raw)
    known = ModelConfig.model_fields.keys() - (() if kind in _MOE_TYPES else MOE_FIELDS)
    fields = {key: raw[key] for key in known if raw.get(key) is not None}
    fields["qk_norm"] = kind == "qwen3"
    fields["tie_word_embeddings"] = raw.get("tie_word_embeddings", False)
    fields.pop("rope_scaling", None)
    if (theta := rope.pop("rope_theta", raw.get("rope_theta"))) is not None:
        fields["rope_theta"] = theta
    fields |= _rope_fields(path, rope, fields.get("max_position_embeddings"))
    fields.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    required = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
    required |= {"num_attention_heads", "max_position_embeddings"}
    fields.setdefault("rms_norm_eps", 1e-6)  # as in transformers
    if kind == "qwen3":
        required |= {"head_dim"}
    elif isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        fields.setdefault("head_dim", hidden // heads)
    if kind in _MOE_TYPES:
        required |= {"num_local_experts", "num_experts_per_tok"}
        if not fields.get("num_local_experts", 1):
            raise ModelError(f"{path}: num_local_experts is 0, and {kind} is a mixture of experts")
        fields.setdefault("attention_multiplier", 1.0)  # as in transformers
        if kind == "granitemoe":
            fields["shared_intermediate_size"] = 0
    if missing := sorted(required - fields.keys()):
        raise ModelError(f"{path}: {', '.join(missing)} missing")
    try:
        config = ModelConfig.model_validate(fields, strict=True)
    except ValidationError as error:
        raise ModelError(f"{path}: {_first(error)}") from error
    if config.attention_multiplier == config.head_dim**-0.5:
        config = config.model_copy(update={"attention_multiplier": None})
    return config


# What a model of these types may have and this code has not: the value under which it is absent.
_ABSENT: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (),
}


def _check_supported(path: Path, raw: dict[str, Any]) -> None:
    """Raise ModelError for the first key whose value this code has no place for."""
    for key, absent in _ABSENT.items():
        value = raw.get(key)
        if value is not None and value not in absent:
            raise ModelError(f"{path}: {key} = {_shown(value)} is not supported here")
    layers = raw.get("layer_types") or []
    if not isinstance(layers, list):
        raise ModelError(f"{path}: layer_types is not a list")
    for layer in layers:
        if layer != "full_attention":
            raise ModelError(f"{path}: layer_types with {_shown(layer)} is not supported here")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"


def _rope_parameters(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """`rope_scaling` of transformers 4, or `rope_parameters` of version 5, without empty keys."""
    for key in ("rope_scaling", "rope_parameters"):
        if raw.get(key) is not None and not isinstance(raw[key], dict):
            raise ModelError(f"{path}: {key} is not an object")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # as version 5 chooses
    return {name: value for name, value in rope.items() if value is not None}


def _rope_fields(path: Path, rope: dict[str, Any], context: Any) -> dict[str, Any]:
    """`rope_scaling`, and `max_position_embeddings` where another is meant than is written."""
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    if kind == "default":
        for key, value in rope.items():
            raise ModelError(f"{path}: rope_parameters.{key} = {_shown(value)} is not supported")
        return {}
    if kind not in get_args(RopeKind):
        raise ModelError(
            f"{path}: rope_type = {_shown(kind)} is not supported here; "
            f"{', '.join(get_args(RopeKind))} are"
        )
    factor = rope.get("factor")
    sensible = isinstance(context, int) and abs(context) < 2**53
    if sensible and isinstance(factor, int | float) and 1 <= factor <= 1e6:
        if kind == "linear":  # its context is what is written
            rope["original_max_position_embeddings"] = max(1, round(context / factor))
        elif kind == "dynamic":  # what is written is its original one, whatever the key says
            rope["original_max_position_embeddings"] = context
            context = round(context * factor)
        else:
            rope.setdefault("original_max_position_embeddings", context)
    try:
        scaling = RopeScaling.model_validate(rope | {"rope_type": kind}, strict=True)
    except ValidationError as error:
        raise ModelError(f"{path}: {_first(error, 'rope_parameters')}") from error
    return {"rope_scaling": scaling, "max_position_embeddings": context}


def _first(error: ValidationError, within: str = "") -> str:
    """The first complaint of pydantic, with its key and value."""
    first = error.errors()[0]
    what = ".".join(map(str, (*([within] if within else []), *first["loc"]))) or "the shape"
    if first["type"] == "extra_forbidden":
        return f"{what} = {_shown(first['input'])} is not supported here"
    return f"{what}: {first['msg']}"


def _tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor; what of the file was mapped into memory for it goes when it goes."""
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def load_model(
    directory: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """Read a model directory. Raises ModelError when its tensors do not fit its configuration."""
    config = read_config(directory)
    path = directory  # of the file at hand, for the message
    try:
        with contextlib.ExitStack() as stack:
            files: dict[str, Any] = {}  # tensor -> the open file that holds it
            paths: dict[str, Path] = {}
            for path, names in _weight_files(directory).items():
                file = stack.enter_context(safe_open(path, framework="pt"))
                held = set(file.keys())
                if lost := sorted((names or held) - held):
                    raise ModelError(f"{path}: it has no {lost[0]}, which the index says it has")
                files |= dict.fromkeys(names or held, file)
                paths |= dict.fromkeys(names or held, path)
            path = _weights_name(directory)
            slices = {name: file.get_slice(name) for name, file in files.items()}
            model = _empty_model(path, config, len(slices))
            _check_tensors(path, model, slices)
            if model.lm_head is None and _HEAD in files:
                _check_tied(path, *(files[name].get_tensor(name) for name in (_HEAD, _EMBEDDING)))
        tensors = {n: _tensor(paths[n], n).to(device, dtype) for n in model.state_dict()}
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: cannot be read as safetensors: {error}; copy it again"
        ) from error
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(True)


def stored_dtype(directory: Path) -> str:
    """The torch dtype that a model directory's weights are stored in: its embedding's.

    float32 stands for wider kinds. Raises ModelError where there are no weights.
    """
    for path, names in _weight_files(directory).items():
        with safe_open(path, framework="pt") as file:
            if _EMBEDDING in (names or set(file.keys())):
                stored = file.get_slice(_EMBEDDING).get_dtype()
                return {"BF16": "bfloat16", "F16": "float16"}.get(stored, "float32")
    raise ModelError(f"{directory}: its weights have no {_EMBEDDING}")


def _weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """The files of weights, and which tensors of each count; None: all.

    Raises ModelError when there are none, or when the index leads out of the directory.
    """
    whole, index = directory / "model.safetensors", directory / _INDEX
    if whole.is_file():
        return {whole: None}
    if not index.is_file():
        raise ModelError(
            f"{directory}: there is no model.safetensors; weights of other kinds are not read"
        )
    try:
        places = json.loads(index.read_text("utf-8"))["weight_map"]
        files: dict[Path, set[str] | None] = {}
        named: dict[str, set[str]] = {}
        for tensor, name in places.items():
            named.setdefault(name, set()).add(tensor)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: it is no index of weights; copy it again") from error
    for name, tensors in named.items():
        if not _PLAIN_NAME.fullmatch(str(name)):
            raise ModelError(f"{index}: {_shown(name)} is not the name of a weights file beside it")
        if not (directory / name).is_file():
            raise ModelError(f"{directory}: {name}, which the index names, is missing; copy it too")
        files[directory / name] = tensors
    return files


def _weights_name(directory: Path) -> Path:
    """What to name when the weights as a whole do not fit."""
    whole = directory / "model.safetensors"
    return whole if whole.is_file() else directory / _INDEX


def _empty_model(path: Path, config: ModelConfig, number_of_tensors: int) -> Transformer:
    """Names and shapes without memory for them: a config that promises too much costs nothing."""
    if config.num_hidden_layers > number_of_tensors:
        raise ModelError(
            f"{path}: config.json promises {config.num_hidden_layers:,} layers; the file has fewer"
        )
    try:
        with torch.device("meta"):
            return Transformer(config)
    except (RuntimeError, TypeError) as error:  # the number of elements is no int64
        raise ModelError(f"{path}: config.json promises more than any file can hold") from error


def _check_tensors(path: Path, model: Transformer, found: dict[str, Any]) -> None:
    """Compare names, shapes and kinds with those in the file before anything is allocated."""
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    # A tied head is sometimes stored a second time. Old files hold the frequencies of RoPE too,
    # which follow from the configuration.
    extra = found.keys() - wanted.keys() - {_HEAD}
    extra = {name for name in extra if not name.endswith("rotary_emb.inv_freq")}
    missing = wanted.keys() - found.keys()
    for what, names in (("lacks", missing), ("has unknown tensors:", extra)):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (" …" if len(names) > 3 else "")
            raise ModelError(f"{path} {what} {listed}; it does not belong to its config.json")
    for name, shape in wanted.items():
        if found[name].get_shape() != shape:
            raise ModelError(
                f"{path}: {name} has the shape {found[name].get_shape()}, config.json says {shape}"
            )
        if found[name].get_dtype() not in FLOATS:
            raise ModelError(
                f"{path}: {name} is of the kind {found[name].get_dtype()}; "
                f"only {', '.join(FLOATS)} are read"
            )


def _check_tied(path: Path, head: Tensor, embedding: Tensor) -> None:
    """Raise ModelError for a head that is said to be the embedding and is another matrix."""
    if not torch.equal(head.to(embedding.dtype), embedding):
        raise ModelError(
            f"{path}: {_HEAD} is not {_EMBEDDING}, and config.json says that they are one "
            "(tie_word_embeddings); set it to false there to use both, or take the head out"
        )
