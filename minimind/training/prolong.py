"""More steps for a run that was planned for fewer."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from minimind.config import load_recipe
from minimind.config.settings import Recipe, ScheduleSettings
from minimind.errors import CheckpointError
from minimind.training.checkpoint import inspect_checkpoints, set_aside
from minimind.training.reporter import pluralize
from minimind.training.run import other_recipe
from minimind.training.schedule import lr_fraction

_DECAYED = ".decayed-"


@cache
def stable_steps(num_steps: int, schedule: ScheduleSettings) -> int | None:
    """Steps before the learning rate decays under WSD; None for other schedules.

    A longer run continues from the checkpoint of that step: up to there both are the same (Hu et
    al. 2024, section 4).
    """
    if schedule.name != "wsd":
        return None
    shares = ((step, lr_fraction(step, num_steps, schedule)) for step in range(num_steps)[::-1])
    return next((step + 1 for step, share in shares if share > 1 - 1e-9), None)


def prolong(run: Path, recipe: Recipe, num_steps: int, say: Callable[[str], None]) -> None:
    """Prepare a run for `num_steps` steps, if it was planned for fewer.

    Under WSD it continues from the newest checkpoint before the decay; those of the decay are
    renamed. With another schedule, or where no such checkpoint is kept, it continues from the
    newest one. The model of the shorter run stays until the longer one is finished.
    Raises ConfigError for fewer steps than planned, CheckpointError when no checkpoint is left.
    """
    there = [one for one in inspect_checkpoints(run, thorough=False) if not one.trouble]
    if not there:
        raise CheckpointError(
            f"{run}: no checkpoint is left to continue from with {pluralize(num_steps, 'step')}. "
            "Give the same number of steps, choose another --out, or start over with --fresh"
        )
    planned = int(there[-1].state.get("num_steps", num_steps))
    if num_steps == planned:
        return
    if num_steps < planned:
        kept = load_recipe(run / "recipe.toml").recipe.training.steps
        was = f"training.steps was {planned if kept is None else kept} and is now {num_steps}"
        raise other_recipe(run, [was])
    stable = stable_steps(planned, recipe.schedule)
    start = next((one for one in reversed(there) if stable and one.step <= stable), there[-1])
    (run / "summary.json").unlink(missing_ok=True)
    later = [one for one in there if one.step > start.step]
    for one in later:
        set_aside(one.path, _DECAYED)
    before = lr_fraction(start.step - 1, planned, recipe.schedule)
    after = lr_fraction(start.step, num_steps, recipe.schedule)
    say(
        f"{run}: {num_steps:,} steps instead of {planned:,}, continued from step {start.step:,}, "
        f"where the learning rate goes from {before:.3g} to {after:.3g} of its peak"
        + f"; later checkpoints are renamed to {_DECAYED}step-…"
        * bool(later)
    )
