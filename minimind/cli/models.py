"""Open the models that `eval` and `compare` name: directories, adapters, and services."""

import os
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind.cli import console
from minimind.environment import KEY_VARIABLE
from minimind.errors import ModelError, TokenizerError, UsageError, shell_words

if TYPE_CHECKING:
    from minimind.evaluation.remote import Service


def open_model(
    model_spec: str,
    device: str,
    *,
    adapter: Path | None = None,
    context: int | None = None,
    taken: Container[str] = (),
) -> Any:
    """Open DIR, DIR+ADAPTER, URL or URL#NAME under a name that is not in `taken`.

    Raises ModelError for an invalid model or adapter, ServiceError if a service is unreachable,
    and UsageError if it lacks the model.
    """
    model: Any
    if is_service(model_spec):
        if adapter or context:
            raise UsageError("--adapter and --context do not apply to a service; set them there")
        model = open_service(model_spec)
    else:
        directory, named_adapter = _split_adapter(model_spec)
        if adapter and named_adapter:
            raise UsageError(f"{model_spec} already names an adapter; omit --adapter")
        model = _open_local(directory, device, adapter or named_adapter, context)
    name, number = model.name, 1
    while model.name in taken:
        number += 1
        model.name = f"{name} {number}"
    return model


def _open_local(directory: Path, device: str, adapter: Path | None, context: int | None) -> Any:
    """Open a local model; fall back to transformers, if installed, for other architectures."""
    from minimind.evaluation.models import LocalModel
    from minimind.evaluation.transformers_model import TransformersModel, is_installed

    model = LocalModel(directory, device, adapter=adapter, context=context)
    try:
        model.check()
    except (ModelError, TokenizerError) as error:
        if adapter or not is_installed():
            raise
        try:
            fallback = TransformersModel(model.directory, device, context=context)
        except ModelError as other:
            raise ModelError(f"{error}; {other}") from other
        console.say(f"{directory}: loaded with transformers, because {error}")
        return fallback
    return model


def is_service(model_spec: str) -> bool:
    """Return True for the URL of a service; an existing path is always a path."""
    return "://" in model_spec and not Path(model_spec).exists()


def _split_adapter(model_spec: str) -> tuple[Path, Path | None]:
    """Split DIR+ADAPTER at the plus sign that is not part of an existing path."""
    splits = [
        (Path(model_spec[:at]), Path(model_spec[at + 1 :]))
        for at, sign in enumerate(model_spec)
        if sign == "+" and at and Path(model_spec[:at]).exists()
    ]
    if not splits or Path(model_spec).exists():
        return Path(model_spec), None
    return max(splits, key=lambda split: split[1].exists())


def open_service(url: str, *key_variables: str) -> "Service":
    """Open a model of a service; the first variable that is set holds its API key.

    Raises ServiceError if the service is unreachable and UsageError if it lacks the model.
    """
    from minimind.evaluation.remote import Service

    variables = (*key_variables, KEY_VARIABLE)
    keys = [os.environ.get(variable) for variable in variables]
    return Service(url, next(filter(None, keys), None), " or ".join(variables))


def report_dropped(model: Any) -> None:
    """Report the sampling parameters that a service rejected and replaced by its defaults."""
    if rejected := sorted(getattr(model, "rejected", ())):
        console.say(f"{model.name}: the service rejects {', '.join(rejected)}; its defaults apply")


def pretrained_only_hint(model: Path) -> str | None:
    """Return a hint for a model that was pretrained and not fine-tuned; None for others."""
    from minimind.training.run import is_only_pretrained

    if not is_only_pretrained(model):
        return None
    if model.name == "model":  # name the run instead of the directory in it
        model = model.parent
    tune = shell_words("minimind", "sft", "--model", model, "--data", "CHATS", "--out", "DIR")
    return (
        f"{model} was only pretrained: it continues text and has not been trained to answer. "
        f"Fine-tune it on conversations: {tune}"
    )
