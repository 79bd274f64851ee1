"""The models that are served: each has an engine, a name and a queue of its own."""

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
from minimind.serving.limits import Queue
from minimind.tokenizer import Tokenizer
from minimind.version import __version__


@dataclass(frozen=True)
class ServedModel:
    """One name under /v1/models."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    own_context: int  # tokens that it can read, which free memory may make fewer here
    created: int  # seconds since 1970, of its weights
    fingerprint: str
    queue: Queue
    defaults: GenerationDefaults
    grammars: GrammarCompiler

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer together."""
        return self.engine.context

    @property
    def cache(self) -> str:
        """The size of its KV cache, as it is shown when the service starts."""
        engine = self.engine
        shown = (
            f"KV cache of {engine.model.slots} × {engine.context:,} tokens "
            f"({engine.cache_bytes / 1e9:.1f} GB)"
        )
        if engine.context == self.own_context:
            return shown
        return f"{shown}; the model can read {self.own_context:,}"

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return frozenset(self.tokenizer.stop_ids)


@dataclass(frozen=True)
class Source:
    """What a served model is made of: a model directory, and a LoRA adapter where there is one."""

    model: Path
    adapter: Path | None = None

    def __str__(self) -> str:
        return str(self.adapter or self.model)


def find_models(paths: Sequence[Path]) -> dict[str, Source]:
    """Name to source: of each path, or of each folder in it, that is a model or an adapter.

    Each is named after its directory, or the link to it; the `model` or `adapter` of a run, after
    the run. Raises ModelError where there is none, or where an adapter's model is not there;
    UsageError when two have one name.
    """
    found: dict[str, Source] = {}
    for path in paths:
        for place in _places_at(path):
            name, source = _source_at(place)
            if found.setdefault(name, source) != source:
                raise UsageError(
                    f"two models are called {name}: {found[name]} and {source}; "
                    "rename a directory, or serve them apart"
                )
    return found


def _places_at(path: Path) -> list[Path]:
    if _is_model(path) or _is_adapter(path):
        return [path]
    below = sorted(path.iterdir()) if path.is_dir() else []
    seen = [place for place in below if not place.name.startswith(".")]  # those are half written
    places = [place for place in seen if _is_model(place) or _is_adapter(place)]
    if not places:
        resolve_model_directory(path)  # says what there is instead
    return places


def _is_model(path: Path) -> bool:
    return _leads(resolve_model_directory, path)


def _is_adapter(path: Path) -> bool:
    return _leads(resolve_adapter_directory, path)


def _leads(resolve: Callable[[Path], Path], path: Path) -> bool:
    try:
        resolve(path)
    except (ModelError, OSError):  # what cannot be read is none
        return False
    return True


def _source_at(place: Path) -> tuple[str, Source]:
    place = Path(os.path.abspath(place))  # links are kept: a model goes by the name of its link
    if _is_model(place):
        directory = resolve_model_directory(place)
        return _name(place, directory), Source(directory.resolve())
    directory = resolve_adapter_directory(place)
    return _name(place, directory), Source(_base_of(place, directory), directory.resolve())


def _name(place: Path, directory: Path) -> str:
    run = directory.parent
    is_run = place == run or (run / "recipe.toml").is_file() or (run / "checkpoints").is_dir()
    is_part = is_run and directory.name in ("model", "adapter")
    # The root of the file system has no name.
    return run.name if is_part and run.name else directory.name


def _base_of(place: Path, directory: Path) -> Path:
    """The model that an adapter was made for: where it says or, if both were moved, beside it."""
    try:
        said = json.loads((directory / "adapter_config.json").read_text("utf-8"))
        base = Path(said["base_model_name_or_path"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        base = Path()
    beside = place.parent / (base.parent.name if base.name == "model" else base.name)
    for candidate in (base, beside):
        if base.name and _is_model(candidate):
            return resolve_model_directory(candidate).resolve()
    named = shell_words("--adapter", f"{_name(place, directory)}={place}")
    where = f"{base} and {beside}" if base.name else "its adapter_config.json does not say where"
    raise ModelError(
        f"{place} is a LoRA adapter, and the model that it was made for is not there ({where}): "
        f"serve it as `minimind serve MODEL {named}`"
    )


def find_adapters(given: Sequence[str], models: Mapping[str, Source]) -> dict[str, Source]:
    """Name to source of adapters that are given as NAME=DIR.

    Raises UsageError for what is not, for a name that is taken, and where it is not plain which
    model an adapter belongs to.
    """
    bases = {name: source.model for name, source in models.items() if source.adapter is None}
    if given and len(bases) != 1:
        raise UsageError(
            f"--adapter goes with one model, and there are {len(bases)}: {', '.join(bases)}"
        )
    found: dict[str, Source] = {}
    for text in given:
        if Path(text).exists():  # an equals sign in its name separates nothing
            named = shell_words("--adapter", f"NAME={text}")
            raise UsageError(f"--adapter {text} is a path without a name for it; write {named}")
        name, equals, directory = text.partition("=")
        if not (name and equals and directory):
            raise UsageError(f"--adapter {text} is not NAME=DIR, such as --adapter poet=out/poet")
        if name in found or name in models:
            raise UsageError(f"--adapter {text}: another model is called {name}; take a new name")
        [base] = bases.values()
        found[name] = Source(base, Path(directory))
    return found


def load_models(
    sources: Mapping[str, Source],
    *,
    device: str,
    slots: int | None = None,
    waiting: int = 64,
    int8: bool = False,
    context: int | None = None,
    rope_scaling: RopeKind | None = None,
) -> dict[str, ServedModel]:
    """Models that are ready to answer, by name. Raises what `load_for_inference` and Engine raise.

    Their KV caches share the memory that is free once all weights are loaded, in equal parts;
    slots, context: as in Engine. An adapter is merged into weights of its own, so it costs no time,
    and memory for one model.
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
        model, tokenizer = loaded.pop(name)  # the engine has its own weights
        engine = Engine(
            model,
            tokenizer,
            slots=slots,
            context=context,
            int8=int8,
            usable=None if usable is None else usable // len(sources),
        )
        adapters = [] if source.adapter is None else [resolve_adapter_directory(source.adapter)]
        places = [source.model, *adapters]
        files = [path for place in places for path in sorted(place.glob("*.safetensors"))]
        head = model.head_weight
        # What may change an answer to the same seed, besides the weights.
        how = f"{__version__} {head.device.type} {head.dtype} {int8} {context} {rope_scaling}"
        digest = hashlib.sha256(f"{how} {fingerprint(*places)}".encode()).hexdigest()
        served[name] = ServedModel(
            name=name,
            engine=engine,
            tokenizer=tokenizer,
            own_context=model.config.max_position_embeddings,
            created=int(max(path.stat().st_mtime for path in files)),
            fingerprint=f"fp_{digest[:12]}",
            queue=Queue(engine.model.slots, waiting),
            defaults=read_generation_defaults(source.model),
            grammars=GrammarCompiler(tokenizer),
        )
    return served
