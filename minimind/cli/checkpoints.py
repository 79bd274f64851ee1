"""`minimind checkpoints list RUN`, `verify RUN` and `extract RUN --out DIR`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind.cli import console
from minimind.errors import CheckpointError

if TYPE_CHECKING:
    from minimind.training.checkpoint import CheckpointInfo

app = typer.Typer(help="Look at the checkpoints of a run.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")]


@app.command("list")
def list_checkpoints(run: Run, json: Json = None) -> None:
    """Show what is kept: step, date, size, validation, and whether a file is missing or cut."""
    _show(run, json, thorough=False)


@app.command()
def verify(run: Run, json: Json = None) -> None:
    """The same, but read every byte; exit with status 1 if a checkpoint is damaged."""
    damaged = _show(run, json, thorough=True)
    if damaged:
        raise typer.Exit(1)


@app.command()
def extract(
    run: Run,
    out: Annotated[Path, typer.Option(help="Model or adapter directory to write.")],
    step: Annotated[int | None, typer.Option(help="Which checkpoint; default: the best.")] = None,
) -> None:
    """Make a model directory (of a LoRA run: an adapter) of a checkpoint, such as the best."""
    from minimind.training.extract import extract_checkpoint

    console.say(
        f"What the run had learned by step {extract_checkpoint(run, step, out):,} is in {out}"
    )


def _show(run: Path, json: Path | None, *, thorough: bool) -> int:
    """Print the table; how many are damaged."""
    from minimind.training.checkpoint import damaged_checkpoints, inspect_checkpoints

    there = inspect_checkpoints(run, verify_hashes=thorough)
    if not there:
        raise CheckpointError(
            f"{run}: there are no checkpoints; give a run directory, one that has saved something"
        )
    metrics = [_metrics(one, there) for one in there]
    rows = [
        [
            one["step"],
            one["saved"].replace("T", " ")[:19],
            f"{one['bytes'] / 1e6:,.1f}",
            ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in one["validation"].items()),
            ", ".join(name for name in ("newest", "best") if one[name]),
            one["trouble"] or ("whole" if thorough else "complete"),
        ]
        for one in metrics
    ]
    columns = ["step", "saved", "MB", "validation", "", "state"]
    console.show(console.table(str(run), columns, rows))
    damaged = sum(bool(one["trouble"]) for one in metrics)
    if json:
        console.write_json(json, {"run": str(run), "read": thorough, "checkpoints": metrics})
    if damaged:
        left = "goes on from the newest whole one" if damaged < len(there) else "cannot go on"
        console.say(f"{damaged} of {len(there)} damaged; the run {left}")
    for one in there:
        if one.unknown:
            console.say(f"{one.path}: {', '.join(one.unknown)} does not belong to a checkpoint")
    if aside := damaged_checkpoints(run):
        names = ", ".join(place.name for place in aside)
        console.say(f"set aside in {run / 'checkpoints'} because they were damaged: {names}")
    return damaged


def _metrics(one: "CheckpointInfo", there: list["CheckpointInfo"]) -> dict[str, Any]:
    """What is told of a checkpoint."""
    from minimind.training.checkpoint import best_step
    from minimind.training.validation import selection_metric

    validation = (
        one.state.get("validation") if one.state.get("validated_step") == one.step else None
    )
    shown = (
        {selection_metric(validation): validation[selection_metric(validation)]}
        if validation
        else {}
    )
    return {
        "step": one.step,
        "path": str(one.path),
        "saved": one.saved.isoformat(timespec="seconds"),
        "bytes": one.bytes,
        "validation": shown,
        "newest": one is there[-1],
        "best": one.step == best_step(there),
        "trouble": one.error,
    }
