"""What `eval` and `compare` are given: directories, with an adapter or without, and services."""

import os
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind.cli import console
from minimind.environment import KEY_VARIABLE
from minimind.errors import ModelError, TokenizerError, UsageError

if TYPE_CHECKING:
    from minimind.evaluation.remote import Service


def open_model(
    place: str,
    device: str,
    *,
    adapter: Path | None = None,
    context: int | None = None,
    taken: Container[str] = (),
) -> Any:
    """DIR, DIR+ADAPTER, URL or URL#NAME; of a name that is not yet taken.

    Raises ModelError for what is no model or no adapter, ServiceError when nobody answers, and
    UsageError for a service without that model.
    """
    model: Any
    if is_service(place):
        if adapter or context:
            raise UsageError("--adapter and --context are for a service to choose")
        model = open_service(place)
    else:
        directory, beside = _split(place)
        if adapter and beside:
            raise UsageError(f"{place} names an adapter already; leave out --adapter")
        model = _local(directory, device, adapter or beside, context)
    name, number = model.name, 1
    while model.name in taken:
        number += 1
        model.name = f"{name} {number}"
    return model


def _local(directory: Path, device: str, adapter: Path | None, context: int | None) -> Any:
    """By our own reading; what that refuses, by transformers where it is installed."""
    from minimind.evaluation.models import LocalModel
    from minimind.evaluation.transformers_model import TransformersModel, is_installed

    model = LocalModel(directory, device, adapter=adapter, context=context)
    try:
        model.check()
    except (ModelError, TokenizerError) as error:
        if adapter or not is_installed():
            raise
        try:
            there = TransformersModel(model.directory, device, context=context)
        except ModelError as other:
            raise ModelError(f"{error}; {other}") from other
        console.say(f"{directory}: read by transformers, because {error}")
        return there
    return model


def is_service(place: str) -> bool:
    """Whether a model is named by the URL of its service; an existing path is always a path."""
    return "://" in place and not Path(place).exists()


def _split(place: str) -> tuple[Path, Path | None]:
    """A directory, and the adapter named after a plus sign unless that sign is part of a path."""
    splits = [
        (Path(place[:at]), Path(place[at + 1 :]))
        for at, sign in enumerate(place)
        if sign == "+" and at and Path(place[:at]).exists()
    ]
    if not splits or Path(place).exists():
        return Path(place), None
    return max(splits, key=lambda split: split[1].exists())


def open_service(url: str, *key_variables: str) -> "Service":
    """A model of a service; its key is in the first of the variables that is set.

    Raises ServiceError when nobody answers, UsageError when it lacks the model.
    """
    from minimind.evaluation.remote import Service

    variables = (*key_variables, KEY_VARIABLE)
    keys = [os.environ.get(variable) for variable in variables]
    return Service(url, next(filter(None, keys), None), " or ".join(variables))


def report_dropped(model: Any) -> None:
    """Name the parameters that a service refused, for its own defaults hold instead."""
    if dropped := sorted(getattr(model, "rejected", ())):
        console.say(f"{model.name}: the service refuses {', '.join(dropped)}: its defaults hold")
