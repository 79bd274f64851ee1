"""`minimind checkpoints list RUN`, `verify RUN` and `extract RUN --out DIR`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind.cli import console
from minimind.cli.options import Json, Run
from minimind.errors import CheckpointError
from minimind.files import write_json

if TYPE_CHECKING:
    from minimind.training.checkpoint import CheckpointInfo

app = typer.Typer(help="List, verify and extract the checkpoints of a run.", no_args_is_help=True)


@app.command("list")
def list_checkpoints(run: Run, json: Json = None) -> None:
    """List the checkpoints: step, date, size, validation, state.

    Missing and truncated files are reported.
    """
    _show(run, json, thorough=False)


@app.command()
def verify(run: Run, json: Json = None) -> None:
    """Verify the hash of every checkpoint file.

    The exit status is 1 if a file is damaged.
    """
    damaged = _show(run, json, thorough=True)
    if damaged:
        raise typer.Exit(1)


@app.command()
def extract(
    run: Run,
    out: Annotated[Path, typer.Option(help="Model or adapter directory to write.")],
    step: Annotated[
        int | None, typer.Option(help="Step of the checkpoint; default: the best.")
    ] = None,
) -> None:
    """Export a checkpoint as a model directory or LoRA adapter."""
    from minimind.training.extract import extract_checkpoint

    extracted = extract_checkpoint(run, step, out)
    console.say(f"The checkpoint of step {extracted:,} is in {out}")


def _show(run: Path, json: Path | None, *, thorough: bool) -> int:
    """Print the table of checkpoints; return the number of damaged ones."""
    from minimind.training.checkpoint import (
        damaged_checkpoints,
        decayed_checkpoints,
        inspect_checkpoints,
    )

    inspected = inspect_checkpoints(run, verify_hashes=thorough)
    if not inspected:
        raise _no_checkpoints(run)
    metrics = [_metrics(checkpoint, inspected) for checkpoint in inspected]
    rows = [
        [
            row["step"],
            row["saved"] and row["saved"].replace("T", " ")[:19],
            console.format_size(row["bytes"]),
            ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in row["validation"].items()),
            ", ".join(name for name in ("newest", "best") if row[name]),
            row["trouble"] or ("verified" if thorough else "complete"),
        ]
        for row in metrics
    ]
    columns = ["step", "saved", "size", "validation", "", "state"]
    console.show(console.table(str(run), columns, rows))
    damaged = sum(bool(row["trouble"]) for row in metrics)
    if json:
        write_json(json, {"run": str(run), "read": thorough, "checkpoints": metrics})
    if damaged:
        can_resume = damaged < len(inspected)
        effect = "resumes from the newest valid one" if can_resume else "cannot be resumed"
        count = console.pluralize(len(inspected), "checkpoint")
        console.say(f"damaged: {damaged} of {count}; the run {effect}")
    for checkpoint in inspected:
        if checkpoint.unknown:
            names = ", ".join(checkpoint.unknown)
            console.say(f"{checkpoint.path}: not part of a checkpoint: {names}")
    if quarantined := damaged_checkpoints(run):
        names = ", ".join(path.name for path in quarantined)
        console.say(f"damaged checkpoints, quarantined in {run / 'checkpoints'}: {names}")
    if decayed := decayed_checkpoints(run):
        names = ", ".join(path.name for path in decayed)
        console.say(
            f"checkpoints left behind when the run was extended, in {run / 'checkpoints'}, which "
            f"may be deleted: {names}"
        )
    return damaged


def _no_checkpoints(run: Path) -> CheckpointError:
    """Return the error for a path without checkpoints, with the runs in it that have some."""
    if not run.is_dir():
        reason = "is a file" if run.exists() else "there is no such directory"
        advice = "give the directory of a run, the --out of a training command"
        return CheckpointError(f"{run}: {reason}; {advice}")
    runs = sorted({str(path.parent.parent) for path in run.glob("*/checkpoints/step-*")})
    advice = f"give one of {', '.join(runs)}" if runs else "give a run that has saved one"
    return CheckpointError(f"{run}: contains no checkpoint; {advice}")


def _metrics(checkpoint: "CheckpointInfo", all_of_run: list["CheckpointInfo"]) -> dict[str, Any]:
    """Return the metrics of a checkpoint for the table and the JSON file."""
    from minimind.training.checkpoint import best_step
    from minimind.training.validation import selection_metric

    is_current = checkpoint.state.get("validated_step") == checkpoint.step
    validation = checkpoint.state.get("validation", {}) if is_current else {}
    name = selection_metric(validation)
    return {
        "step": checkpoint.step,
        "path": str(checkpoint.path),
        "saved": checkpoint.saved and checkpoint.saved.isoformat(timespec="seconds"),
        "bytes": checkpoint.bytes,
        "validation": {name: validation[name]} if name in validation else {},
        "newest": checkpoint is all_of_run[-1],
        "best": checkpoint.step == best_step(all_of_run),
        "trouble": checkpoint.error,
    }
