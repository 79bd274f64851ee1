"""A run directory: what belongs to a run, whether one has begun or finished, and its recipe."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from minimind.config import Role, difference, dump_recipe, load_recipe, role_of
from minimind.config.settings import Recipe
from minimind.errors import CheckpointError, ConfigError

_CHECKPOINT = re.compile(r"step-(\d{8,})")
TOKENIZER = ".tokenizer"  # in a run: a copy, for when the original was removed or re-made
_LENGTH = {"training.steps", "training.epochs"}


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run by name, newest first, damaged ones too.

    Raises CheckpointError when the folder is there and cannot be read.
    """
    home = run / "checkpoints"
    try:
        places = [place for place in home.iterdir() if _CHECKPOINT.fullmatch(place.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable(home, error) from error
    return sorted(places, key=step_of, reverse=True)


def unreadable(place: Path, error: Exception) -> CheckpointError:
    """The error of a checkpoint that may be whole, but that the system does not read now."""
    return CheckpointError(
        f"{place} cannot be read: {error}. Nothing was changed. Give the same command again when "
        "it can be read; to resume from an older checkpoint, move this one away"
    )


def has_begun(run: Path) -> bool:
    """True if there is something to resume or to lose: a checkpoint, a model or an adapter."""
    products = (run / "model", run / "adapter")
    return any(place.is_dir() for place in products) or bool(checkpoints(run))


def product(run: Path, recipe: Recipe) -> Path:
    """The directory that a finished stage leaves in its run: the model, or the adapter."""
    return run / ("adapter" if recipe.lora else "model")


def finished_summary(run: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The summary of a finished run of the stage; None if it is not finished."""
    path = run / "summary.json"
    if not (path.is_file() and product(run, recipe).is_dir()):
        return None
    try:
        summary: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except ValueError:
        return None
    return summary


def is_finished(run: Path, recipe: Recipe) -> bool:
    """True if the run is finished, and was made by a recipe of the same identity."""
    if finished_summary(run, recipe) is None:
        return False
    try:
        changes = difference(load_recipe(run / "recipe.toml").recipe, recipe)
    except ConfigError:
        return False
    return all(role_of(key) is Role.OPERATION for key in changes)


def clear(run: Path, recipe: Recipe) -> None:
    """Remove an earlier run, and nothing else that is in its directory.

    Raises ConfigError when the stage is to begin with what would be removed.
    """
    for needed in (recipe.model.init, recipe.tokenizer):
        if needed and Path(needed).resolve() in (run.resolve(), (run / "model").resolve()):
            raise ConfigError(
                f"{needed} would be removed by --fresh, and the run needs it; choose another --out"
            )
    # In this order: what is half removed is neither a finished run nor one of another recipe.
    tracker_ids = ("wandb-run-id", "swanlab-run-id")
    reports = ("report.html", "report.md", "metrics.jsonl")
    for name in ("summary.json", *reports, "reference.safetensors", *tracker_ids):
        (run / name).unlink(missing_ok=True)
    for name in ("model", "adapter", "tensorboard", "report-plots", TOKENIZER, "checkpoints"):
        if (run / name).exists():
            shutil.rmtree(run / name)
    (run / "recipe.toml").unlink(missing_ok=True)


def recipe_changes(run: Path, recipe: Recipe) -> dict[str, str]:
    """What differs from the recipe with which the run has begun, as text by dotted key.

    The place of the run may differ. Raises ConfigError when a setting differs that decides the
    result, except the number of steps: whether that may change, the checkpoints decide.
    """
    kept = run / "recipe.toml"
    if not (kept.is_file() and has_begun(run)):
        return {}  # a mistake ended it before its first checkpoint: there is nothing to lose
    changes = difference(load_recipe(kept).recipe.model_copy(update={"out": recipe.out}), recipe)
    decisive = {key for key in changes if role_of(key) is Role.IDENTITY}
    if decisive - _LENGTH:
        raise other_recipe(run, [changes[key] for key in changes if key in decisive])
    return changes


def changes_length(changes: dict[str, str]) -> bool:
    """True if the number of steps may be another than the run began with."""
    return not _LENGTH.isdisjoint(changes)


def other_recipe(run: Path, changes: list[str]) -> ConfigError:
    """The error of settings that would make another run of this one."""
    return ConfigError(
        f"{run} holds a run of another recipe: {'; '.join(changes)}. Give the same settings, "
        "choose another --out, or start over with --fresh"
    )


def write_recipe(run: Path, recipe: Recipe) -> None:
    """Record the resolved recipe of the run."""
    write_atomically(run / "recipe.toml", dump_recipe(recipe))


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all, and flush it to the disk."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, path)
