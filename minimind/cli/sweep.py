"""`minimind sweep RECIPE KEY=A,B,C…`: variants of a recipe, trained one by one and compared."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind.cli import console
from minimind.cli.train import Data, recipe_and_settings
from minimind.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from minimind.planning.sweep import Outcomes, PlannedRun


def sweep(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE KEY=A,B,C",
            help="A recipe, and settings to change; of several values, each combination is a run.",
        ),
    ] = None,
    data: Data = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer directory.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("out/sweep"),
    devices: Annotated[
        str | None,
        typer.Option(metavar="D,D", help="One run at once on each, such as cuda:0,cuda:1."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make all runs again.")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    """Train variants of a recipe and compare them: loss by parameters, tokens and time."""
    from minimind.model.device import choose_device
    from minimind.planning.sweep import device_settings, run_all

    for device in devices.split(",") if devices else ():
        choose_device(device)  # else each run would fail for the same reason
    flags: dict[str, Any] = {"data.sources": data, "tokenizer": tokenizer}
    places = device_settings(devices.split(",")) if devices else [("", {})]
    flags |= {"device": places[0][0]}
    planned, settings, broken = _plan(arguments or [], flags, out)
    # What was varied is there for `report` before the first run is finished.
    console.write_json(out / "sweep.json", {"settings": settings, "failed": broken})
    console.say(f"{len(planned)} runs in {out}")
    with console.make_progress("step") as bar:
        outcomes = run_all(
            planned, [more for _, more in places], fresh=fresh, watcher=_watcher(bar)
        )
    outcomes.failed |= broken
    _finish(out, settings, outcomes, json)


def _plan(
    arguments: list[str], flags: dict[str, Any], out: Path
) -> "tuple[list[PlannedRun], dict[str, dict[str, Any]], dict[str, str]]":
    """The runs, what sets each apart, and those that cannot be.

    A variant whose settings do not go together is one of these; if all are, it is raised.
    """
    from minimind.config import load_recipe, variants
    from minimind.planning.sweep import PlannedRun

    recipe, overrides = recipe_and_settings(arguments)
    given = {key: value for key, value in flags.items() if value}
    planned, settings = [], {}
    broken: dict[str, str] = {}
    for variant in variants(overrides):
        run = {"out": str(out / variant.name)}
        settings[variant.name] = variant.settings
        try:
            resolved = load_recipe(recipe, overrides=variant.overrides, flags=given | run)
        except ConfigError as error:
            broken[variant.name] = str(error)
            continue
        log = out / "logs" / f"{variant.name}.log"
        planned.append(PlannedRun(variant.name, resolved.recipe, log))
    if not planned:
        raise UsageError(next(iter(broken.values())))
    return planned, settings, broken


def _watcher(bar: Any) -> Any:
    """Draws a line for each run that is going on, and says how each ends."""
    from minimind.planning.sweep import Watcher

    class _Bars(Watcher):
        def __init__(self) -> None:
            self._tasks: dict[int, Any] = {}

        def started(self, slot: int, planned: "PlannedRun") -> None:
            steps = planned.recipe.training.steps
            self._tasks[slot] = bar.add_task(planned.name, total=steps, note="")

        def progress(self, slot: int, planned: "PlannedRun", line: dict[str, Any]) -> None:
            rate = console.figure(round(line["tokens_per_second"]))
            note = f"loss {console.figure(line.get('loss'))} {rate} tokens/s"
            bar.update(self._tasks[slot], completed=line["step"], note=note)

        def ended(self, slot: int, planned: "PlannedRun", failure: str | None) -> None:
            if slot in self._tasks:
                bar.remove_task(self._tasks.pop(slot))
            console.say(f"{planned.name}: {failure or 'finished'}")

    return _Bars()


def _finish(
    out: Path, settings: dict[str, dict[str, Any]], outcomes: "Outcomes", json: Path | None
) -> None:
    """The table, the fits, the report, and what failed."""
    from minimind.reporting.report import make_report

    told = {"settings": settings, "failed": outcomes.failed}
    console.write_json(out / "sweep.json", told)
    if outcomes.finished:
        made = make_report([out])
        made.write(out / "report.html")
        for path in filter(None, (out / "summary.json", json)):
            console.write_json(path, told | made.metrics)
        columns = ["parameters", "tokens", "seconds", "loss", "bits_per_byte"]
        rows = [
            (name, *(made.metrics["runs"].get(name, {}).get(column) for column in columns))
            for name in settings
            if name in outcomes.finished
        ]
        titles = [column.replace("_", " ") for column in columns]
        console.show(console.table("Sweep", ["run", *titles], rows, numbers=len(columns)))
        for kind, fits in made.metrics.get("fits", {}).items():
            for axis, fit in fits.items():
                console.say(f"{kind}, loss by {axis}: {_law(fit)}")
        console.say(f"The report with all curves: {out / 'report.html'}")
    for name, failure in outcomes.failed.items():
        console.say(f"failed: {name}: {failure}")
    if outcomes.stopped:
        raise typer.Exit(130)
    if outcomes.failed:
        raise typer.Exit(1)


def _law(fit: dict[str, Any]) -> str:
    if "reason" in fit:
        return str(fit["reason"])
    return (
        f"{fit['floor']:.3g} + {fit['scale']:.4g} / x^{fit['exponent']:.3g}, "
        f"R² {fit['r_squared']:.3f} of {fit['points']} points"
    )
