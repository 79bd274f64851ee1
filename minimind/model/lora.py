"""LoRA (Hu et al. 2021): small trained matrices beside frozen ones, and the files that hold them.

    RUN/adapter/adapter_config.json        as peft writes it: rank, alpha, target modules
                adapter_model.safetensors  lora_A [r, in] and lora_B [out, r] of each module

In memory the matrices are `<module>.lora_A` and `<module>.lora_B`; peft calls them
`base_model.model.<module>.lora_A.weight`. What peft can do beyond plain LoRA is refused by name.
"""

import difflib
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minimind.config.settings import LoRASettings
from minimind.errors import ConfigError, ModelError
from minimind.model.directory import FLOATS, write_atomically, write_json
from minimind.model.transformer import Transformer

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MATRICES = ("lora_A", "lora_B")
_GROUPS = {"attention": ("self_attn",), "mlp": ("mlp", "shared_mlp")}
# What a config may say without changing what is computed here, beside what is read below.
_HARMLESS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout"}
_HARMLESS |= {"megatron_core", "peft_version", "qalora_group_size", "revision", "task_type"}
_HARMLESS |= {"layers_pattern"}
_READ = {"peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "bias"}
_READ |= {"rank_pattern", "alpha_pattern", "init_lora_weights"}
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # the base stays as it is
_MOST_QUANTIFIERS = 4


class LoRALinear(nn.Linear):
    """W x + scale · B A dropout(x), of which only A [r, in] and B [out, r] are trained.

    It begins as W alone: B is zero.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        device = base.weight.device
        first = torch.empty(rank, base.in_features, dtype=torch.float32)
        nn.init.kaiming_uniform_(first, a=math.sqrt(5))  # as nn.Linear, and peft
        self.lora_A = nn.Parameter(first.to(device))
        second = torch.zeros(base.out_features, rank, dtype=torch.float32, device=device)
        self.lora_B = nn.Parameter(second)
        self.scale, self.dropout = alpha / rank, dropout

    def forward(self, input: Tensor) -> Tensor:
        dropped = F.dropout(input, self.dropout, self.training)
        low = F.linear(dropped, self.lora_A)
        return super().forward(input) + F.linear(low, self.lora_B) * self.scale

    def merged(self) -> Tensor:
        """[out, in], the one matrix that computes the same without dropout."""
        return self.weight + (self.scale * (self.lora_B @ self.lora_A)).to(self.weight.dtype)


def apply_lora(model: Transformer, settings: LoRASettings) -> Transformer:
    """Freeze the model and put a `LoRALinear` in the place of each module that is to be adapted.

    The first values of A come from the CPU's generator, so that they are the same on every device.
    Raises ConfigError for a target that the model does not have.
    """
    chosen = _chosen(model, settings.targets)
    model.requires_grad_(False)
    for name in chosen:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        adapted = LoRALinear(base, settings.rank, settings.alpha, settings.dropout)
        model.set_submodule(name, adapted.train(model.training))
    return model


def _chosen(model: Transformer, targets: Sequence[str]) -> list[str]:
    """The full names of the modules that `targets`, names or groups, mean."""
    groups: dict[str, set[str]] = {group: set() for group in (*_GROUPS, "all")}
    by_name: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        parent, leaf = ["", *name.split(".")][-2:]
        for group, parents in _GROUPS.items():
            if isinstance(module, nn.Linear) and parent in parents:
                by_name.setdefault(leaf, set()).add(name)
                groups[group].add(name)
                groups["all"].add(name)
    known = by_name | groups
    for target in targets:
        if target not in known:
            near = difflib.get_close_matches(target, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"lora.targets: the model has no {target!r}; {hint}there are {', '.join(known)}"
            )
    wanted = set().union(*(known[target] for target in targets))
    return [name for name, _ in model.named_modules() if name in wanted]


def _adapted(model: Transformer) -> Iterator[tuple[str, LoRALinear]]:
    return ((n, module) for n, module in model.named_modules() if isinstance(module, LoRALinear))


def save_adapter(directory: Path, model: Transformer, settings: LoRASettings, base: Path) -> None:
    """Write the adapter of a model that `apply_lora` made, whole or not at all.

    Raises ResourceError when it cannot be written, ModelError when something else is there.
    """
    tensors = {
        f"{_PREFIX}{name}.{matrix}.weight": getattr(module, matrix).detach().cpu().contiguous()
        for name, module in _adapted(model)
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
        "target_modules": sorted({_target(name) for name, _ in _adapted(model)}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with write_atomically(directory, "LoRA adapter", _CONFIG, size) as work:
        save_file(tensors, work / _WEIGHTS, metadata={"format": "pt"})
        write_json(work / _CONFIG, config)


def _target(name: str) -> str:
    """A module as `target_modules` names it; the routed experts have an input_linear too."""
    parent, leaf = name.split(".")[-2:]
    return f"{parent}.{leaf}" if parent == "shared_mlp" else leaf


def resolve_adapter_directory(path: Path) -> Path:
    """The adapter directory that `path` means: itself, or the `adapter` of a run directory.

    Raises ModelError when there is none.
    """
    for place in (path, path / "adapter"):
        if (place / _CONFIG).is_file():
            return place
    if not path.exists():
        raise ModelError(f"{path}: there is no such directory; give an adapter or run directory")
    raise ModelError(
        f"{path} is not a LoRA adapter: it has no {_CONFIG}. `minimind lora` makes one; "
        "a run has it once it is finished"
    )


@torch.no_grad()
def merge_adapter(model: Transformer, directory: Path) -> None:
    """Add an adapter, ours or one that peft has made, to the weights of its base model, in place.

    The sum is formed in float32. Raises ModelError for an adapter that is broken, that asks for
    more than plain LoRA, or that belongs to another model.
    """
    config = _read_config(directory)
    path = directory / _WEIGHTS
    if not path.is_file():
        raise ModelError(
            f"{directory}: there is no {_WEIGHTS}; weights of other kinds are not read"
        )
    try:
        with safe_open(path, framework="pt") as file:
            modules = _check_tensors(path, model, config, file)
            for name, module in modules.items():
                a, b = (file.get_tensor(_tensor(name, matrix)).float() for matrix in _MATRICES)
                weight = module.weight
                sum_ = weight.float() + (_scale(config, name) * (b @ a)).to(weight.device)
                weight.copy_(sum_)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: cannot be read as safetensors: {error}; copy it again"
        ) from error


def _tensor(module: str, matrix: str) -> str:
    return f"{_PREFIX}{module}.{matrix}.weight"


def _read_config(directory: Path) -> dict[str, Any]:
    """`adapter_config.json`, checked. Raises ModelError for what this code cannot compute."""
    path = directory / _CONFIG
    try:
        raw = json.loads(path.read_text("utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as a LoRA configuration: {error}") from error
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{path}: peft_type {kind!r} is not supported; LORA is")
    unsupported = [key for key in raw.keys() - _HARMLESS - _READ if not _is_unset(raw[key])]
    if raw.get("bias", "none") != "none":
        unsupported.append("bias")
    start = raw.get("init_lora_weights")
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        unsupported.append("init_lora_weights")
    if unsupported:
        raise ModelError(
            f"{path}: {', '.join(sorted(unsupported))}: set to something that is not supported "
            "here; merge the adapter with peft (merge_and_unload) and give the merged model"
        )
    return _checked(path, raw)


def _is_unset(value: object) -> bool:
    """Whether peft takes it for nothing; 0 is a number, such as that of a layer."""
    return value is None or value is False or value in ([], {}, "")


def _checked(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """The keys that are used, each of the kind that it has to be."""
    config = {
        "r": raw.get("r", 8),
        "lora_alpha": raw.get("lora_alpha", 8),
        "target_modules": raw.get("target_modules"),
        "use_rslora": raw.get("use_rslora") or False,
        "rank_pattern": raw.get("rank_pattern") or {},
        "alpha_pattern": raw.get("alpha_pattern") or {},
    }
    targets = config["target_modules"]
    named = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    fits = {
        "r": _is_rank(config["r"]),
        "lora_alpha": _is_number(config["lora_alpha"]),
        "target_modules": bool(targets) and (named or isinstance(targets, str)),
        "use_rslora": isinstance(config["use_rslora"], bool),
        "rank_pattern": _is_table(config["rank_pattern"], _is_rank),
        "alpha_pattern": _is_table(config["alpha_pattern"], _is_number),
    }
    for key, is_right in fits.items():
        if not is_right:
            raise ModelError(f"{path}: {key} is missing, or of the wrong kind")
    patterns = [*config["rank_pattern"], *config["alpha_pattern"]]
    for pattern in [*patterns, *([targets] if isinstance(targets, str) else [])]:
        if not _is_tame(pattern):
            raise ModelError(f"{path}: the pattern {pattern[:80]!r} is broken, or takes too long")
    return config


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 20


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # type: ignore[arg-type]


def _is_table(value: object, fits: Any) -> bool:
    return isinstance(value, dict) and all(map(fits, value.values()))


def _is_tame(pattern: str) -> bool:
    """Whether a regular expression compiles and cannot run for ages: few stars, none on a group."""
    few = len(pattern) < 1000 and len(re.findall(r"[*+{]", pattern)) <= _MOST_QUANTIFIERS
    try:
        return few and not re.search(r"\)[*+{]", pattern) and bool(re.compile(pattern))
    except (re.error, RecursionError, OverflowError):
        return False


def _check_tensors(
    path: Path, model: Transformer, config: dict[str, Any], file: Any
) -> dict[str, nn.Linear]:
    """Compare the file's tensors with the model and the config: the adapted modules by name."""
    found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    modules = {name: m for name, m in linear.items() if _is_target(name, config["target_modules"])}
    wanted = {
        _tensor(name, matrix): shape
        for name, module in modules.items()
        for matrix, shape in zip(_MATRICES, _shapes(config, name, module), strict=True)
    }
    for table in ("embed_tokens", "lm_head"):
        if any(table in name.split(".") for name in found.keys() - wanted.keys()):
            raise ModelError(
                f"{path}: it changes {table}, which is not supported here; merge the adapter with "
                "peft (merge_and_unload) and give the merged model"
            )
    if not wanted:
        raise ModelError(f"{path}: the model has none of the modules that the adapter changes")
    unknown, missing = found.keys() - wanted.keys(), wanted.keys() - found.keys()
    for what, names in (("lacks", missing), ("has tensors that the model lacks:", unknown)):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (" …" if len(names) > 3 else "")
            raise ModelError(f"{path} {what} {listed}; it was made for another model")
    for name, shape in wanted.items():
        if found[name].get_shape() != shape:
            raise ModelError(
                f"{path}: {name} has the shape {found[name].get_shape()}, and {shape} would fit "
                "the model and the adapter's rank; it was made for another model"
            )
        if found[name].get_dtype() not in FLOATS:
            raise ModelError(
                f"{path}: {name} is of the kind {found[name].get_dtype()}; "
                f"only {', '.join(FLOATS)} are read"
            )
    return modules


def _is_target(name: str, targets: str | list[str]) -> bool:
    """As peft decides it: a list of names or their ends, or one regular expression."""
    if targets in ("all-linear", ["all-linear"]):
        return name != "lm_head" and not name.endswith("router.layer")
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _shapes(config: dict[str, Any], name: str, module: nn.Linear) -> tuple[list[int], list[int]]:
    rank = _by_pattern(config["rank_pattern"], name, config["r"])
    return [rank, module.in_features], [module.out_features, rank]


def _scale(config: dict[str, Any], name: str) -> float:
    rank = _by_pattern(config["rank_pattern"], name, config["r"])
    alpha: float = _by_pattern(config["alpha_pattern"], name, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def _by_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that is the module's name, or an end of it."""
    fitting = (v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(fitting, default)
