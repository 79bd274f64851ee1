"""`minimind sweep RECIPE KEY=A,B,C…`: train variants of a recipe and compare them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind.cli import console
from minimind.cli.downloads import Yes, ensure_downloaded
from minimind.cli.options import Json, Tokenizer
from minimind.cli.train import Data, data_paths, recipe_and_settings
from minimind.errors import ConfigError, UsageError
from minimind.files import write_json

if TYPE_CHECKING:
    from minimind.planning.sweep import Outcomes, PlannedRun


def sweep(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE KEY=A,B,C",
            help="A recipe, and settings to override; each combination of values is a run.",
        ),
    ] = None,
    data: Data = None,
    tokenizer: Tokenizer = None,
    out: Annotated[Path, typer.Option(help="Folder of the run directories.")] = Path("out/sweep"),
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="D,D", help="Devices that each train one run at a time, such as cuda:0,cuda:1."
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard previous runs.")] = False,
    yes: Yes = False,
    json: Json = None,
) -> None:
    """Train variants of a recipe and compare their losses.

    The losses are compared by parameters, tokens and time.
    """
    from minimind.model.device import choose_device
    from minimind.planning.sweep import device_settings, run_all

    for device in devices.split(",") if devices else ():
        choose_device(device)  # fail here rather than once per run
    flags: dict[str, Any] = {"data.sources": data, "tokenizer": tokenizer}
    per_device = device_settings(devices.split(",")) if devices else [("", {})]
    flags |= {"device": per_device[0][0]}
    planned, settings, invalid = _plan(arguments or [], flags, out)
    ensure_downloaded((path for run in planned for path in data_paths(run.recipe)), yes)
    # Written first, so that `minimind report` works before the first run has finished.
    write_json(out / "sweep.json", {"settings": settings, "failed": invalid})
    console.say(f"{len(planned)} runs in {out}")
    with console.make_progress("step") as bar:
        outcomes = run_all(
            planned,
            [environment for _, environment in per_device],
            fresh=fresh,
            watcher=_watcher(bar),
        )
    outcomes.failed |= invalid
    _finish(out, settings, outcomes, json)


def _plan(
    arguments: list[str], flags: dict[str, Any], out: Path
) -> "tuple[list[PlannedRun], dict[str, dict[str, Any]], dict[str, str]]":
    """Return the planned runs, the varied settings by run, and the errors of invalid variants.

    Raises UsageError if every variant is invalid.
    """
    from minimind.config import load_recipe, variants
    from minimind.planning.sweep import PlannedRun

    recipe, overrides = recipe_and_settings(arguments)
    set_flags = {key: value for key, value in flags.items() if value}
    planned, settings = [], {}
    invalid: dict[str, str] = {}
    for variant in variants(overrides):
        run = {"out": str(out / variant.name)}
        settings[variant.name] = variant.settings
        try:
            resolved = load_recipe(recipe, overrides=variant.overrides, flags=set_flags | run)
        except ConfigError as error:
            invalid[variant.name] = str(error)
            continue
        log = out / "logs" / f"{variant.name}.log"
        planned.append(PlannedRun(variant.name, resolved.recipe, log))
    if not planned:
        raise UsageError("; ".join(describe_failures(invalid, len(settings))))
    return planned, settings, invalid


def _watcher(bar: Any) -> Any:
    """Return a watcher that draws a progress bar per active run and reports its outcome.

    An error that several runs have in common is printed once.
    """
    from minimind.planning.sweep import Watcher

    class _Bars(Watcher):
        def __init__(self) -> None:
            self._tasks: dict[int, Any] = {}
            self._first_failed: dict[str, str] = {}  # names of runs, by error

        def started(self, slot: int, planned: "PlannedRun") -> None:
            steps = planned.recipe.training.steps
            self._tasks[slot] = bar.add_task(planned.name, total=steps, note="")

        def progress(self, slot: int, planned: "PlannedRun", line: dict[str, Any]) -> None:
            rate = console.format_number(round(line["tokens_per_second"]))
            note = f"loss {console.format_number(line.get('loss'))} {rate} tokens/s"
            bar.update(self._tasks[slot], completed=line["step"], note=note)

        def ended(self, slot: int, planned: "PlannedRun", failure: str | None) -> None:
            if slot in self._tasks:
                bar.remove_task(self._tasks.pop(slot))
            outcome = failure or "finished"
            if failure:
                first = self._first_failed.setdefault(failure, planned.name)
                outcome = failure if first == planned.name else f"the same error as {first}"
            console.say(f"{planned.name}: {outcome}")

    return _Bars()


def _finish(
    out: Path, settings: dict[str, dict[str, Any]], outcomes: "Outcomes", json: Path | None
) -> None:
    """Print the results table and the fits, write the report, and report failed runs."""
    from minimind.reporting.report import make_report

    variants = {"settings": settings, "failed": outcomes.failed}
    write_json(out / "sweep.json", variants)
    if outcomes.finished:
        report = make_report([out])
        report.write(out / "report.html")
        for path in filter(None, (out / "summary.json", json)):
            write_json(path, variants | report.metrics)
        columns = ["parameters", "tokens", "seconds", "loss", "bits_per_byte"]
        # Not by their names in the report: a base model outside the sweep may have one of them.
        own = [run for run in report.inputs.runs if run.folder.parent.resolve() == out.resolve()]
        metrics = {run.folder.name: run.metrics for run in own}
        rows = [
            (name, *(metrics.get(name, {}).get(column) for column in columns))
            for name in settings
            if name in outcomes.finished
        ]
        titles = [column.replace("_", " ") for column in columns]
        console.show(console.table("Sweep", ["run", *titles], rows, numbers=len(columns)))
        for kind, fits in report.metrics.get("fits", {}).items():
            for axis, fit in fits.items():
                console.say(f"{kind}, loss by {axis}: {_scaling_law(fit)}")
        others = {path.parent.name for path in out.glob("*/recipe.toml")} - {*settings}
        if others := others - {*outcomes.failed}:
            count = console.pluralize(len(others), "run")
            console.say(f"{out} also has {count} of other sweeps, which the report leaves out")
        console.say(f"Report with all curves: {out / 'report.html'}")
    for line in describe_failures(outcomes.failed, len(settings)):
        console.say(f"failed: {line}")
    if outcomes.stopped:
        raise typer.Exit(130)
    if outcomes.failed:
        raise typer.Exit(1)


def describe_failures(failed: Mapping[str, str], num_runs: int) -> list[str]:
    """Return a line per error, with the runs that failed for it. failed: errors by run."""
    by_error: dict[str, list[str]] = {}
    for name, error in failed.items():
        by_error.setdefault(error, []).append(name)
    return [
        f"all {num_runs} runs: {error}"
        if len(names) == num_runs > 1
        else f"{', '.join(names)}: {error}"
        for error, names in by_error.items()
    ]


def _scaling_law(fit: dict[str, Any]) -> str:
    if "reason" in fit:
        return str(fit["reason"])
    return (
        f"{fit['floor']:.3g} + {fit['scale']:.4g} / x^{fit['exponent']:.3g}, "
        f"R² {fit['r_squared']:.3f} for {fit['points']} points"
    )
