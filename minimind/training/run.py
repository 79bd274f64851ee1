"""The run directory: its files, the state of the run, and the recipe that identifies it.

    recipe.toml       the resolved recipe, every setting spelled out
    metrics.jsonl     losses, validations and samples, one JSON object per line
    checkpoints/      step-00001000, …, to resume an interrupted run
    .tokenizer/       a copy of the tokenizer, in case the original is removed
    model/            the finished model, or with LoRA adapter/
    summary.json      the results of the finished run

Every command uses the functions here to decide whether a run has begun or is finished.
"""

import os
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minimind.config import Role, difference, dump_recipe, load_recipe, role_of
from minimind.config.settings import Recipe
from minimind.data.input_files import would_match
from minimind.data.registry import is_name
from minimind.data.textbook import is_textbook
from minimind.errors import CheckpointError, ConfigError
from minimind.files import read_json, write_atomically
from minimind.paths import expand_user

RECIPE_FILE = "recipe.toml"
SUMMARY_FILE = "summary.json"
TOKENIZER_COPY = ".tokenizer"
_REMOVED_FILES = (
    *(SUMMARY_FILE, "report.html", "report.md", "metrics.jsonl", "reference.safetensors"),
    *("wandb-run-id", "swanlab-run-id"),
)
_CHECKPOINT = re.compile(r"step-(\d{8,})")
_NUM_STEPS_SETTINGS = {"training.steps", "training.epochs"}


def run_directory(recipe: Recipe) -> Path:
    """Return the directory of the recipe's run. Raises ConfigError if it is not set or a file."""
    if recipe.out is None:
        raise ConfigError("out is not set, so the run has no directory. Give --out DIR")
    run = Path(recipe.out)
    if run.exists() and not run.is_dir():
        raise ConfigError(f"{run} is a file. --out must name a directory for the run")
    return run


def output_directory(run: Path, recipe: Recipe) -> Path:
    """Return where a finished stage stores its model, or with LoRA its adapter."""
    return run / ("adapter" if recipe.lora else "model")


def checkpoints_folder(run: Path) -> Path:
    """Return the directory that holds the checkpoints of a run."""
    return run / "checkpoints"


def step_of(checkpoint: Path) -> int:
    """Return the number of optimizer steps in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoint_paths(run: Path) -> list[Path]:
    """List the checkpoints of a run by name, newest first, damaged ones included.

    Raises CheckpointError if the directory exists and cannot be read.
    """
    folder = checkpoints_folder(run)
    try:
        paths = [path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable_checkpoint(folder, error) from error
    return sorted(paths, key=step_of, reverse=True)


def unreadable_checkpoint(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a checkpoint that may be valid but cannot be read at the moment."""
    return CheckpointError(
        f"{path} cannot be read: {error}. Nothing was changed. Run the same command again when "
        "it can be read; to resume from an older checkpoint, move this one away"
    )


def has_begun(run: Path) -> bool:
    """Return True if a run has something to resume or lose: a checkpoint, a model or an adapter."""
    outputs = (run / "model", run / "adapter")
    return any(path.is_dir() for path in outputs) or bool(checkpoint_paths(run))


def finished_summary(run: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Return the summary of a finished run, or None if the run is not finished.

    A run is finished when its model or adapter and a readable summary exist.
    """
    if not output_directory(run, recipe).is_dir():
        return None
    try:
        summary: dict[str, Any] = read_json(run / SUMMARY_FILE)
    except (FileNotFoundError, ValueError):
        return None
    return summary


def is_finished(run: Path, recipe: Recipe) -> bool:
    """Return True if the run is finished and its recipe differs in operation settings at most."""
    if finished_summary(run, recipe) is None:
        return False
    try:
        changes = _changes(load_recipe(run / RECIPE_FILE).recipe, recipe)
    except ConfigError:
        return False
    return all(role_of(key) is Role.OPERATION for key in changes)


def check_is_run(run: Path, fresh: bool) -> None:
    """Raise ConfigError for a directory with results but no recipe, such as that of a demo.

    Its checkpoints cannot be matched with a recipe, and its model may be that of all stages or one
    that no run has made. fresh: `remove_run` would remove more than training replaces.
    """
    if (run / RECIPE_FILE).is_file():
        return
    removed = [*_removed_folders(run), *(run / name for name in _REMOVED_FILES)]
    existing = [path for path in removed if path.exists()]
    if existing and (fresh or has_begun(run)):
        raise ConfigError(
            f"{existing[0]} exists, but {run} has no {RECIPE_FILE}: no training run has made it, "
            "or its recipe was removed. Choose another --out"
        )


def check_outside_data(run: Path, recipe: Recipe) -> None:
    """Raise ConfigError if the run is inside a folder of data, whose files are all read."""
    data = recipe.data
    for path in (each.path for each in (*data.sources, *data.validation, *data.retention)):
        if would_match(path, run.resolve() / "metrics.jsonl"):
            raise ConfigError(
                f"{run} is inside the data {path}, so the files of the run would be read as "
                "data. Choose another --out, or data that excludes it"
            )


def check_removable(run: Path, recipe: Recipe) -> None:
    """Raise ConfigError if `remove_run` would remove a model or tokenizer that the stage needs."""
    for needed in (recipe.model.init, recipe.tokenizer):
        if needed and Path(needed).resolve() in (run.resolve(), (run / "model").resolve()):
            raise ConfigError(
                f"{needed} would be removed by --fresh, but the run starts from it. Choose "
                "another --out"
            )


def _removed_folders(run: Path) -> list[Path]:
    """List the folders that `remove_run` removes."""
    names = ("model", "adapter", "tensorboard", "report-plots", TOKENIZER_COPY)
    return [*(run / name for name in names), checkpoints_folder(run)]


def remove_run(run: Path) -> None:
    """Remove the files of an earlier run from its directory and leave all others."""
    # Summary first, recipe last: after an interruption, the remaining files are neither taken for
    # a finished run nor for a run of another recipe.
    for name in _REMOVED_FILES:
        (run / name).unlink(missing_ok=True)
    for folder in _removed_folders(run):
        if folder.exists():
            shutil.rmtree(folder)
    (run / RECIPE_FILE).unlink(missing_ok=True)


def recipe_changes(run: Path, recipe: Recipe) -> dict[str, str]:
    """Describe, by setting, how `recipe` differs from the recipe of a run that has begun.

    The run directory may have moved, alone or with the folder around it. Raises ConfigError if a
    setting that identifies the run differs. The number of steps may differ: `extend.py` decides
    whether the run can be extended.
    """
    if not has_begun(run):
        return {}
    changes = _changes(load_recipe(run / RECIPE_FILE).recipe, recipe)
    changes.pop("out", None)
    identity = {key for key in changes if role_of(key) is Role.IDENTITY}
    if "objective" in identity:  # the other changes follow from it
        raise ConfigError(
            f"{run} holds a run of another stage: {changes['objective']}. Choose another --out"
        )
    if identity - _NUM_STEPS_SETTINGS:
        raise other_recipe_error(run, [changes[key] for key in changes if key in identity])
    return changes


def _changes(old: Recipe, new: Recipe) -> dict[str, str]:
    """Return the settings that differ.

    Another spelling of a path is no difference, nor is a path inside the folder around the run,
    such as that of a road, if this folder has moved to the one around the new `out`.
    """
    old_folder, new_folder = (Path(_absolute(recipe.out or "")).parent for recipe in (old, new))

    def moved(path: str) -> str:
        absolute = _absolute(path)
        if not Path(absolute).is_relative_to(old_folder):
            return absolute
        return str(new_folder / Path(absolute).relative_to(old_folder))

    there = with_paths(new, _absolute)
    changed = difference(with_paths(old, _absolute), there)
    changed_after_move = difference(with_paths(old, moved), there)
    return {
        key: text
        for key, text in difference(old, new).items()
        if key in changed and key in changed_after_move
    }


def _absolute(path: str) -> str:
    if is_name(path) or is_textbook(path):
        return path
    return os.path.abspath(expand_user(path))


def with_paths(recipe: Recipe, change: Callable[[str], str]) -> Recipe:
    """Return a copy of a recipe whose paths are changed, except `out`."""
    data = {
        name: [file.model_copy(update={"path": change(file.path)}) for file in files]
        for name in ("sources", "validation", "retention")
        if (files := getattr(recipe.data, name))
    }
    model, init = recipe.model, recipe.model.init
    return recipe.model_copy(
        update={
            "tokenizer": recipe.tokenizer and change(recipe.tokenizer),
            "model": model.model_copy(update={"init": init and change(init)}),
            "data": recipe.data.model_copy(update=data),
        }
    )


def changes_num_steps(changes: dict[str, str]) -> bool:
    """Return True if one of the changed settings determines the number of steps."""
    return not _NUM_STEPS_SETTINGS.isdisjoint(changes)


def other_recipe_error(run: Path, changes: list[str]) -> ConfigError:
    """Return the error for changed settings that a run cannot continue with."""
    return ConfigError(
        f"{run} holds a run of another recipe: {'; '.join(changes)}. Give the same settings, "
        "choose another --out, or start over with --fresh"
    )


def write_recipe(run: Path, recipe: Recipe) -> None:
    """Record the resolved recipe in the run directory."""
    write_atomically(run / RECIPE_FILE, dump_recipe(recipe))


def is_only_pretrained(model: Path) -> bool:
    """Return True if the run of a model or run directory pretrained a new model.

    Such a model continues text, and was not trained to answer. False without a readable recipe.
    """
    run = model if (model / RECIPE_FILE).is_file() else model.parent
    try:
        recipe = tomllib.loads((run / RECIPE_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    init = recipe.get("model", {}).get("init")
    return recipe.get("objective") == "pretrain" and not init
