"""The served models: discovery in directories, loading, one engine and queue per model."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minimind.config.model import RopeKind
from minimind.errors import ModelError, UsageError, shell_words
from minimind.inference.capacity import usable_bytes
from minimind.inference.defaults import GenerationDefaults, read_generation_defaults
from minimind.inference.engine import Engine
from minimind.inference.grammar import GrammarCompiler
from minimind.inference.load import load_for_inference
from minimind.model import fingerprint, resolve_adapter_directory, resolve_model_directory
from minimind.serving.admission import AdmissionQueue
from minimind.tokenizer import Tokenizer
from minimind.units import format_memory
from minimind.version import __version__


@dataclass(frozen=True)
class ServedModel:
    """A model as listed by /v1/models, with its engine."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    max_context: int  # of the model; the engine may have a shorter context for lack of memory
    created: int  # Unix time of the weight files
    fingerprint: str
    queue: AdmissionQueue
    defaults: GenerationDefaults
    grammars: GrammarCompiler

    @property
    def context(self) -> int:
        """Context length in tokens: prompt and answer together."""
        return self.engine.context

    @property
    def cache_summary(self) -> str:
        """Description of the KV cache, printed when the service starts."""
        engine = self.engine
        summary = (
            f"KV cache of {engine.model.slots} × {engine.context:,} tokens "
            f"({format_memory(engine.cache_bytes)})"
        )
        if engine.context == self.max_context:
            return summary
        return f"{summary}; the model's context is {self.max_context:,}"

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""
        return frozenset(self.tokenizer.stop_ids)


@dataclass(frozen=True)
class Source:
    """Directories of a served model: the model, and optionally a LoRA adapter."""

    model: Path
    adapter: Path | None = None

    def __str__(self) -> str:
        return str(self.adapter or self.model)


def find_models(paths: Sequence[Path]) -> dict[str, Source]:
    """Find the models and adapters at `paths`, or directly below them, and return them by name.

    A model is named after its directory, or the link to it; the `model` or `adapter` directory of
    a run, after the run. Raises ModelError if a path has no model or an adapter's base model is
    missing; UsageError if two models have the same name.
    """
    sources: dict[str, Source] = {}
    for path in paths:
        for directory in _model_directories(path):
            name, source = _named_source(directory)
            if sources.setdefault(name, source) != source:
                raise UsageError(
                    f"two models have the name {name}: {sources[name]} and {source}; "
                    "rename one directory, or start two services"
                )
    return sources


def _model_directories(path: Path) -> list[Path]:
    if _is_model(path) or _is_adapter(path):
        return [path]
    children = sorted(path.iterdir()) if path.is_dir() else []
    # Names with a dot belong to incomplete downloads and saves.
    visible = [child for child in children if not child.name.startswith(".")]
    directories = [child for child in visible if _is_model(child) or _is_adapter(child)]
    if not directories:
        resolve_model_directory(path)  # raises ModelError with what the path contains instead
    return directories


def _is_model(path: Path) -> bool:
    return _resolves(resolve_model_directory, path)


def _is_adapter(path: Path) -> bool:
    return _resolves(resolve_adapter_directory, path)


def _resolves(resolve: Callable[[Path], Path], path: Path) -> bool:
    try:
        resolve(path)
    except (ModelError, OSError):  # unreadable directories do not count
        return False
    return True


def _named_source(path: Path) -> tuple[str, Source]:
    path = Path(os.path.abspath(path))  # not resolved: a link names its model
    if _is_model(path):
        directory = resolve_model_directory(path)
        return _name(path, directory), Source(directory.resolve())
    directory = resolve_adapter_directory(path)
    return _name(path, directory), Source(_base_model(path, directory), directory.resolve())


def _name(path: Path, directory: Path) -> str:
    """Return the name of the model that `path` resolves to: its directory's, or its run's."""
    run = directory.parent
    is_run = path == run or (run / "recipe.toml").is_file() or (run / "checkpoints").is_dir()
    is_part_of_run = is_run and directory.name in ("model", "adapter")
    # run.name is empty for the root of the file system.
    return run.name if is_part_of_run and run.name else directory.name


def _base_model(path: Path, directory: Path) -> Path:
    """Return the base model of an adapter: where its config says, else next to the adapter."""
    try:
        config = json.loads((directory / "adapter_config.json").read_text("utf-8"))
        base = Path(config["base_model_name_or_path"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        base = Path()
    sibling = path.parent / (base.parent.name if base.name == "model" else base.name)
    for candidate in (base, sibling):
        if base.name and _is_model(candidate):
            return resolve_model_directory(candidate).resolve()
    option = shell_words("--adapter", f"{_name(path, directory)}={path}")
    where = (
        f"neither {base} nor {sibling} is a model"
        if base.name
        else ("its adapter_config.json does not name one")
    )
    raise ModelError(
        f"{path} is a LoRA adapter whose base model was not found ({where}); name the base model: "
        f"`minimind serve MODEL {option}`"
    )


def find_adapters(options: Sequence[str], models: Mapping[str, Source]) -> dict[str, Source]:
    """Return the adapters of `--adapter NAME=DIR` options by name.

    Raises UsageError for a malformed option, for a name that is taken, and if there is not exactly
    one base model.
    """
    bases = {name: source.model for name, source in models.items() if source.adapter is None}
    if options and len(bases) != 1:
        raise UsageError(
            f"--adapter requires exactly one MODEL; there are {len(bases)}: {', '.join(bases)}"
        )
    adapters: dict[str, Source] = {}
    for text in options:
        if Path(text).exists():  # a path that contains an equals sign is not NAME=DIR
            option = shell_words("--adapter", f"NAME={text}")
            raise UsageError(f"--adapter {text} is a path without a name; write {option}")
        name, equals, directory = text.partition("=")
        if not (name and equals and directory):
            raise UsageError(f"--adapter {text} is not NAME=DIR, such as --adapter poet=out/poet")
        if name in adapters or name in models:
            raise UsageError(
                f"--adapter {text}: another model has the name {name}; choose another name"
            )
        [base] = bases.values()
        adapters[name] = Source(base, Path(directory))
    return adapters


def load_models(
    sources: Mapping[str, Source],
    *,
    device: str,
    slots: int | None = None,
    max_queued: int = 64,
    int8: bool = False,
    context: int | None = None,
    rope_scaling: RopeKind | None = None,
) -> dict[str, ServedModel]:
    """Load models and start their engines. Raises what `load_for_inference` and Engine raise.

    After all weights are loaded, the KV caches share the free memory equally. An adapter is merged
    into a copy of its base model's weights: it costs memory for one model and no time per token.
    `slots`, `context`: see Engine.
    """
    loaded = {
        name: load_for_inference(
            source.model, device, adapter=source.adapter, context=context, rope_scaling=rope_scaling
        )
        for name, source in sources.items()
    }
    usable = usable_bytes([model for model, _ in loaded.values()])
    served: dict[str, ServedModel] = {}
    for name, source in sources.items():
        model, tokenizer = loaded.pop(name)  # the engine keeps its own copy of the weights
        engine = Engine(
            model,
            tokenizer,
            slots=slots,
            context=context,
            int8=int8,
            usable=None if usable is None else usable // len(sources),
        )
        adapters = [] if source.adapter is None else [resolve_adapter_directory(source.adapter)]
        directories = [source.model, *adapters]
        files = [path for folder in directories for path in sorted(folder.glob("*.safetensors"))]
        head = model.head_weight
        # Everything besides the seed that can change an answer.
        numerics = f"{head.device.type} {head.dtype} {int8} {engine.model.is_native}"
        settings = f"{__version__} {numerics} {context} {rope_scaling}"
        digest = hashlib.sha256(f"{settings} {fingerprint(*directories)}".encode()).hexdigest()
        served[name] = ServedModel(
            name=name,
            engine=engine,
            tokenizer=tokenizer,
            max_context=model.config.max_position_embeddings,
            created=int(max(path.stat().st_mtime for path in files)),
            fingerprint=f"fp_{digest[:12]}",
            queue=AdmissionQueue(engine.model.slots, max_queued),
            defaults=read_generation_defaults(source.model),
            grammars=GrammarCompiler(tokenizer),
        )
    return served
