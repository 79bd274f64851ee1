"""The models that are served: each has an engine, a name and a queue of its own."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from minimind import __version__
from minimind.config.model import RopeKind
from minimind.errors import ModelError, UsageError
from minimind.inference.engine import Engine
from minimind.inference.json_object import JsonGrammar
from minimind.inference.load import load_for_inference
from minimind.model import resolve_adapter_directory, resolve_model_directory
from minimind.serving.limits import Queue
from minimind.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """One name under /v1/models."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    context: int  # tokens
    created: int  # seconds since 1970, of its weights
    fingerprint: str
    queue: Queue

    @cached_property
    def json(self) -> JsonGrammar:
        """What its tokens mean in an answer that is to be a JSON object."""
        return JsonGrammar(self.tokenizer)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return frozenset(self.tokenizer.stop_ids)


def find_models(paths: Sequence[Path]) -> dict[str, Path]:
    """Name to model directory: of each path, or of each folder in it that is a model.

    A model is named after its directory; the `model` of a run, after the run. Raises ModelError
    where there is no model, UsageError when two have one name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        for place in _models_at(path):
            directory = resolve_model_directory(place).resolve()
            name = _name(place, directory)
            if found.setdefault(name, directory) != directory:
                raise UsageError(
                    f"two models are called {name}: {found[name]} and {directory}; "
                    "rename a directory, or serve them apart"
                )
    return found


def _name(place: Path, directory: Path) -> str:
    run = directory.parent
    is_run = (
        place.resolve() == run or (run / "recipe.toml").is_file() or (run / "checkpoints").is_dir()
    )
    # The root of the file system has no name.
    return run.name if directory.name == "model" and is_run and run.name else directory.name


def _models_at(path: Path) -> list[Path]:
    try:
        resolve_model_directory(path)
    except ModelError:
        below = sorted(path.iterdir()) if path.is_dir() else []
        models = [place for place in below if _is_model(place)]
        if not models:
            raise
        return models
    return [path]


def _is_model(path: Path) -> bool:
    if path.name.startswith("."):  # half written
        return False
    try:
        resolve_model_directory(path)
    except ModelError:
        return False
    return True


def find_adapters(given: Sequence[str], models: Mapping[str, Path]) -> dict[str, Path]:
    """Name to directory of adapters that are given as NAME=DIR.

    Raises UsageError for what is not, for a name that is taken, and where it is not plain which
    model an adapter belongs to.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, directory = text.partition("=")
        if not (name and equals and directory):
            raise UsageError(f"--adapter {text} is not NAME=DIR, such as --adapter poet=out/poet")
        if name in found or name in models:
            raise UsageError(f"--adapter {text}: another model is called {name}; take a new name")
        found[name] = Path(directory)
    if found and len(models) != 1:
        raise UsageError(
            f"--adapter goes with one model, and there are {len(models)}: {', '.join(models)}"
        )
    return found


def load_served(
    name: str,
    directory: Path,
    adapter: Path | None = None,
    *,
    device: str,
    slots: int,
    waiting: int,
    int8: bool = False,
    context: int | None = None,
    rope_scaling: RopeKind | None = None,
) -> ServedModel:
    """A model that is ready to answer. Raises what `load_for_inference` raises.

    An adapter is merged into weights of its own, so it costs no time, and memory for one model.
    """
    model, tokenizer = load_for_inference(
        directory, device, adapter=adapter, context=context, rope_scaling=rope_scaling
    )
    sources = [directory] if adapter is None else [directory, resolve_adapter_directory(adapter)]
    files = [path for place in sources for path in sorted(place.glob("*.safetensors"))]
    how = f"{model.head_weight.device.type} {int8} {context} {rope_scaling}"
    engine = Engine(model, tokenizer, slots=slots, int8=int8)
    return ServedModel(
        name=name,
        engine=engine,
        tokenizer=tokenizer,
        context=engine.context,
        created=int(max(path.stat().st_mtime for path in files)),
        fingerprint=_fingerprint(sources, how),
        queue=Queue(slots, waiting),
    )


def _fingerprint(directories: Sequence[Path], how: str) -> str:
    """Changes with what may change an answer to the same seed: weights, how they run, version."""
    digest = hashlib.sha256(f"{__version__} {how}".encode())
    for path in (path for directory in directories for path in sorted(directory.iterdir())):
        if path.suffix in (".json", ".safetensors"):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"fp_{digest.hexdigest()[:12]}"
