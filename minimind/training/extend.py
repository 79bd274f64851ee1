"""Extend or shorten a run: continue it for another number of steps than it was planned for.

Under the WSD schedule (warmup, stable, decay) the learning rate is constant until the final decay.
A run is extended from the checkpoint at the end of the stable phase; the model of the shorter run
is the decayed branch (Hu et al. 2024, MiniCPM, section 4). Without warmup, the extended run is
bit-identical to one that was planned with more steps. `schedule.warmup` is a fraction of the steps,
so that with warmup a longer run would have warmed up for more steps.

A run can be shortened in its stable phase, as long as the decay of the shorter run is still ahead.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from minimind.config import load_recipe
from minimind.config.settings import Recipe, ScheduleSettings
from minimind.errors import CheckpointError
from minimind.training.checkpoint import (
    DECAYED_PREFIX,
    CheckpointInfo,
    inspect_checkpoints,
    load_checkpoint,
    set_aside,
)
from minimind.training.reporter import pluralize
from minimind.training.run import RECIPE_FILE, SUMMARY_FILE, other_recipe_error
from minimind.training.schedule import lr_fraction


@cache
def stable_steps(num_steps: int, schedule: ScheduleSettings) -> int | None:
    """Return the number of steps before the decay of a WSD schedule; None for other schedules."""
    if schedule.name != "wsd":
        return None
    fractions = ((step, lr_fraction(step, num_steps, schedule)) for step in range(num_steps)[::-1])
    return next((step + 1 for step, fraction in fractions if fraction > 1 - 1e-9), None)


@dataclass(frozen=True)
class Extension:
    """A plan to extend or shorten a run. later: checkpoints after the one it continues from."""

    later: Sequence[CheckpointInfo]
    description: str


def plan_extension(run: Path, recipe: Recipe, num_steps: int) -> Extension | None:
    """Plan to continue a run with `num_steps` steps; None if the run already has that number.

    Under WSD, the run continues from the newest checkpoint before the decay. With another schedule,
    or if no such checkpoint was kept, it continues from the newest one. Raises ConfigError for
    fewer steps if the decay of the shorter run would have begun before the newest checkpoint, and
    CheckpointError if no checkpoint is left, or if that one is damaged.
    """
    infos = [info for info in inspect_checkpoints(run, verify_hashes=False) if not info.error]
    if not infos:
        raise CheckpointError(
            f"{run}: no checkpoint is left to continue from with {pluralize(num_steps, 'step')}. "
            "Give the same number of steps, choose another --out, or start over with --fresh"
        )
    planned = int(infos[-1].state.get("num_steps", num_steps))
    if num_steps == planned:
        return None
    if num_steps < planned:
        _check_shorter(run, recipe, num_steps, planned, infos[-1].step)
    stable = stable_steps(min(planned, num_steps), recipe.schedule)
    start = next((info for info in reversed(infos) if stable and info.step <= stable), infos[-1])
    load_checkpoint(run, start.step)  # raises if it is damaged, before others are set aside
    later = [info for info in infos if info.step > start.step]
    before = lr_fraction(start.step - 1, planned, recipe.schedule)
    after = lr_fraction(start.step, num_steps, recipe.schedule)
    return Extension(
        later,
        f"{run}: {num_steps:,} steps instead of {planned:,}, continued from step {start.step:,}, "
        f"where the learning rate goes from {before:.3g} to {after:.3g} of its peak"
        + f"; later checkpoints are renamed to {DECAYED_PREFIX}step-…"
        * bool(later),
    )


def _check_shorter(run: Path, recipe: Recipe, num_steps: int, planned: int, newest: int) -> None:
    """Raise ConfigError if a run cannot be shortened. newest: the step of the newest checkpoint."""
    stable = stable_steps(num_steps, recipe.schedule)
    if stable is not None and newest <= stable:
        return
    recorded = load_recipe(run / RECIPE_FILE).recipe.training.steps
    change = f"training.steps was {recorded or planned} and is now {num_steps}"
    if stable is not None:
        change += (
            f", but the newest checkpoint is at step {newest:,}, and with {num_steps:,} steps the "
            f"decay of the learning rate begins at step {stable:,}"
        )
        lengths = range(num_steps, planned)
        shortest = bisect_left(lengths, newest, key=lambda n: stable_steps(n, recipe.schedule) or 0)
        if shortest < len(lengths):
            change += f"; at least {lengths[shortest]:,} steps are possible"
    raise other_recipe_error(run, [change])


def extend_run(run: Path, extension: Extension) -> None:
    """Rename the later checkpoints, and mark the run as not finished.

    The model of the shorter run is kept until the longer one is finished.
    """
    (run / SUMMARY_FILE).unlink(missing_ok=True)
    for info in extension.later:
        set_aside(info.path, DECAYED_PREFIX)
