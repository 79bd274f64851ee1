"""`minimind bench [PRESET]`: speed, memory and cost of training and decoding on this machine."""

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind.cli import console
from minimind.cli.options import Device, Json
from minimind.cli.plan import duration
from minimind.errors import UsageError
from minimind.files import write_json

if TYPE_CHECKING:
    from minimind.config.settings import Recipe

_ROADS = ("small", "moe", "base")
_HOUR_S = 3600
_BUSY = 0.5  # load average from which on other programs cost speed


def bench(
    preset: Annotated[
        str, typer.Argument(metavar="[PRESET]", help="Model preset to measure.")
    ] = "small",
    device: Device = "auto",
    seconds: Annotated[
        float, typer.Option(min=0, help="Duration of each measurement, in seconds.")
    ] = 15.0,
    price: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Price of an hour of this machine (rent or electricity), to show the cost of "
            "the standard recipes.",
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Measure training and decoding on this machine.

    Takes about two minutes. Shows tokens per second, utilisation, memory, the time of the standard
    recipes, and recorded machines to compare with. Weights are random, and nothing is downloaded.
    """
    from minimind.config.model import PRESETS
    from minimind.config.suggest import closest, did_you_mean

    if preset not in PRESETS:
        raise UsageError(
            f"there is no preset {preset}; choose one of {', '.join(PRESETS)}"
            + did_you_mean(closest(preset, PRESETS))
        )
    from minimind.planning.bench import describe_machine, measure_machine, recorded_machines

    machine = describe_machine(device)
    _warn_if_busy(machine)
    reporter = console.RichReporter()
    reporter.start(f"measuring {preset}", total=3, unit="measurement")
    try:
        measured = measure_machine(preset, device, seconds, reporter.progress)
    finally:
        reporter.stop()
    recipes = _recipe_times(measured, price)
    recorded = recorded_machines(preset)
    console.show_metrics("This machine", machine | {"device": measured["device"]})
    _show_speed(measured)
    if recipes:
        _show_recipes(recipes, measured, price)
    _show_recorded(recorded, measured)
    if json:
        record = {"date": date.today().isoformat(), "machine": machine} | measured
        write_json(json, record | {"recipes": recipes, "recorded": recorded})


def _warn_if_busy(machine: Mapping[str, Any]) -> None:
    load = machine["load_average"]
    if load is not None and load > _BUSY:
        console.say(
            f"Other programs are using this machine (load average {load:.1f}): the results will be "
            "too low. Close them, or try again later"
        )


def _show_speed(measured: Mapping[str, Any]) -> None:
    rows: list[tuple[str, object, str]] = []
    for name, decoding in measured["decoding"].items():
        if "error" in decoding:
            rows.append((f"decoding, {name}", "not measured", ""))
            continue
        memory = console.format_memory(decoding["peak_memory_bytes"] or 0)
        for streams in (1, 16):
            label = f"decoding, {name}, {console.pluralize(streams, 'stream')}"
            rows.append((label, decoding[f"streams_{streams}"], memory))
    training = measured["training"]
    if "error" in training:
        rows.append(("training", "not measured", ""))
    else:
        memory = console.format_memory(training["peak_memory_bytes"] or 0)
        sequences = console.pluralize(training["micro_batch_size"], "sequence")
        label = f"training, {training['precision']}, {sequences} of {training['seq_len']}"
        rows.append((label, training["tokens_per_second"], memory))
    columns = ["measurement", "tokens/s", "peak memory"]
    console.show(console.table(f"Speed of {measured['preset']}", columns, rows, numbers=2))
    for part in (training, *measured["decoding"].values()):
        if "error" in part:
            console.say(f"not measured: {part['error']}")
    if "error" not in training:
        console.say(
            f"Utilisation of training: {training['utilisation']:.0%} of the "
            f"{training['attainable_flops'] / 1e12:.3g} TFLOP/s that large matrix products reach "
            "here now"
        )


def _recipe_times(measured: Mapping[str, Any], price: float | None) -> list[dict[str, Any]]:
    """Estimate the training time of the demo and of the roads.

    The utilisation of other presets is assumed to be that of the measured one.
    """
    from minimind.cli.demo import stage_recipes as demo_recipes
    from minimind.cli.road import stage_recipes as road_recipes
    from minimind.cli.road_plan import all_stage_tokens
    from minimind.config.road import load_road
    from minimind.planning.bench import training_flops_per_token

    training, device, out = measured["training"], measured["device"], Path("out")
    if "error" in training:
        return []
    demo = "demo" if device == "cpu" else "small"
    standard: dict[str, tuple[str, dict[str, Recipe]]] = {
        "minimind demo": (demo, demo_recipes(demo, device, out / "demo"))
    }
    for name in _ROADS:
        standard[f"minimind road {name}"] = (name, road_recipes(load_road(name), out, device))
    flops_per_second = training["tokens_per_second"] * training["flops_per_token"]
    result = []
    for command, (preset, recipes) in standard.items():
        tokens = all_stage_tokens(recipes)
        if tokens is None:
            continue
        seconds = tokens * training_flops_per_token(preset) / flops_per_second
        cost = None if price is None else price * seconds / _HOUR_S
        result.append({"command": command, "tokens": tokens, "seconds": seconds, "cost": cost})
    return result


def _show_recipes(
    recipes: list[dict[str, Any]], measured: Mapping[str, Any], price: float | None
) -> None:
    columns = ["command", "training tokens", "time"] + ["cost"] * (price is not None)
    rows = []
    for recipe in recipes:
        row = [recipe["command"], f"{recipe['tokens'] / 1e6:,.0f} million"]
        row.append(duration(recipe["seconds"]))
        rows.append(row + ([] if price is None else [f"{recipe['cost']:,.2f}"]))
    console.show(
        console.table("Training time of the standard recipes", columns, rows, len(columns) - 1)
    )
    console.say(
        f"Estimated with the utilisation of {measured['preset']}. Tokens are estimated from the "
        "size of the data"
    )


def _show_recorded(recorded: list[dict[str, Any]], measured: Mapping[str, Any]) -> None:
    """Show this machine among the recorded ones, the fastest in training first."""
    if not recorded:
        console.say(f"No machine has a record of {measured['preset']} yet")
        return
    here = {
        "processor": "this machine",
        "date": date.today().isoformat(),
        "training": measured["training"].get("tokens_per_second"),
        "decoding": measured["decoding"],
    }
    formats = dict.fromkeys(name for each in (here, *recorded) for name in each.get("decoding", ()))
    cells = [(name, streams) for name in formats for streams in (1, 16)]
    rows = [
        [
            each.get("gpu") or each["processor"],
            each["date"],
            each.get("training"),
            *(
                each.get("decoding", {}).get(name, {}).get(f"streams_{streams}")
                for name, streams in cells
            ),
        ]
        for each in sorted([here, *recorded], key=lambda each: -(each.get("training") or 0))
    ]
    columns = ["machine", "date", "training", *(f"{name}, {number}" for name, number in cells)]
    title = f"Tokens/s with {measured['preset']}: training, and decoding by format and streams"
    console.show(console.table(title, columns, rows, len(columns) - 2))
