"""Turn a checkpoint into a model directory or an adapter."""

from pathlib import Path

import torch

from minimind.config import load_recipe
from minimind.errors import CheckpointError
from minimind.model.saving import check_new_directory
from minimind.training.build import build_tokenizer_and_model, check_base
from minimind.training.checkpoint import (
    CheckpointInfo,
    best_step,
    inspect_checkpoints,
    load_checkpoint,
    restore_weights,
)
from minimind.training.run import RECIPE_FILE, TOKENIZER_COPY
from minimind.training.stage import save_output


def extract_checkpoint(run: Path, step: int | None, out: Path) -> int:
    """Write the model or the adapter of a checkpoint to `out` and return its step.

    step: None means the step with the best validation.
    Raises CheckpointError if the checkpoint is missing, damaged or needs another base model, and
    UsageError if `out` is not empty.
    """
    check_new_directory(out)
    step = _select_step(run, inspect_checkpoints(run, verify_hashes=False), step)
    checkpoint = load_checkpoint(run, step)
    recipe = load_recipe(run / RECIPE_FILE).recipe
    if (copy := run / TOKENIZER_COPY).is_dir():  # the one that the recipe names may have changed
        recipe = recipe.model_copy(update={"tokenizer": str(copy)})
    check_base(recipe, run, checkpoint.state)
    device = torch.device("cpu")
    tokenizer, model = build_tokenizer_and_model(recipe, run, device, checkpoint.state)
    restore_weights(model, checkpoint)
    save_output(out, recipe, model, tokenizer)
    return step


def _select_step(run: Path, infos: list[CheckpointInfo], step: int | None) -> int:
    """Return the step to extract: the requested one or the best. Raises CheckpointError."""
    if not infos:
        raise CheckpointError(f"{run} has no checkpoints; give a run directory that has some")
    steps = ", ".join(f"{info.step:,}" for info in infos)
    best = best_step(infos) if step is None else None
    if step is None and best is None:
        raise CheckpointError(
            f"{run}: no validation is recorded, so the best checkpoint is unknown; "
            f"give --step, one of {steps}"
        )
    selected = best if step is None else step
    assert selected is not None
    if selected not in [info.step for info in infos]:
        which = f"step {selected:,}" + ", which was the best" * (best is not None)
        raise CheckpointError(f"{run}: there is no checkpoint of {which}; available: {steps}")
    return selected
