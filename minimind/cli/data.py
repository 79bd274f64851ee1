"""`minimind data inspect` and `stores`; for the others see `datasets` and `prepare`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from minimind.cli import console, datasets
from minimind.cli.downloads import Yes, ensure_downloaded
from minimind.cli.options import Json
from minimind.cli.pairs import pairs
from minimind.cli.prepare import prepare
from minimind.errors import UsageError
from minimind.files import write_json

app = typer.Typer(
    help="Find, download, inspect and prepare datasets.",
    no_args_is_help=True,
)
app.command("list")(datasets.list_datasets)
app.command()(datasets.info)
app.command()(datasets.get)


@app.command()
def inspect(
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA", help="Files, folders, globs (quoted) or dataset names."),
    ],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer or model directory, to also count tokens.")
    ] = None,
    schema: Annotated[str, typer.Option(help="Schema of the records, or 'auto'.")] = "auto",
    samples: Annotated[
        int, typer.Option(min=0, help="Number of sample records to show per DATA.")
    ] = 3,
    yes: Yes = False,
    json: Json = None,
) -> None:
    """Describe datasets: schemas, counts, lengths, samples.

    Duplicates, invalid records and unused keys are counted too.
    """
    from minimind.data.input_files import list_files
    from minimind.data.schemas import SCHEMAS
    from minimind.data.stats import DatasetStats, inspect_data
    from minimind.tokenizer import Tokenizer

    if schema not in ("auto", *SCHEMAS):
        raise UsageError(f"--schema {schema} is unknown; choose auto, {', '.join(SCHEMAS)}")
    ensure_downloaded(data, yes)
    loaded = Tokenizer.load(tokenizer) if tokenizer else None
    files = [file for path in data for file in list_files(path)]
    combined = DatasetStats()
    per_source: dict[str, dict[str, Any]] = {}
    with console.make_progress("byte") as bar:
        task = bar.add_task("reading", total=sum(file.stat().st_size for file in files), note="")
        for path in dict.fromkeys(data):
            stats = inspect_data(
                path,
                schema=schema,
                tokenizer=loaded,
                num_samples=samples,
                progress=lambda count: bar.advance(task, count),
            )
            combined.merge(stats)
            per_source[path] = stats.metrics()
    total = combined.metrics()
    _show(per_source, total)
    if json:
        write_json(json, {"data": per_source, "total": total})


app.command()(prepare)
app.command()(pairs)


@app.command()
def stores(
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="KEY", help="Stores by key; default: all.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Folder of token stores; default: the cache.")
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove the stores; training rebuilds them.")
    ] = False,
) -> None:
    """List or remove the token stores on this machine."""
    from datetime import datetime

    from minimind.data.store import default_folder
    from minimind.data.store_list import list_stores, remove_store

    home = store or default_folder()
    summaries = list_stores(home)
    for key in keys or []:
        if not any(summary.key.startswith(key) for summary in summaries):
            raise UsageError(f"{home} has no store {key}; omit KEY to list all stores")
        matches = sum(summary.key.startswith(key) for summary in summaries)
        if remove and matches > 1:
            raise UsageError(
                f"{matches} stores begin with {key!r}; give a longer key, or none to remove all"
            )
    selected = [summary for summary in summaries if not keys or summary.key.startswith(tuple(keys))]
    rows = [
        [
            summary.key[:8],
            summary.kind,
            summary.tokens,
            console.format_size(summary.num_bytes),
            f"{datetime.fromtimestamp(summary.created):%Y-%m-%d %H:%M}",
            "\n".join([*summary.files[:3], *(["…"] if len(summary.files) > 3 else [])]),
        ]
        for summary in selected
    ]
    columns = ["key", "kind", "tokens", "size", "created", "data"]
    if rows:
        console.show(console.table(f"Token stores in {home}", columns, rows))
    removed = [summary for summary in selected if remove and remove_store(home, summary.key)]
    for summary in selected if remove else []:
        if summary not in removed:
            console.say(f"{summary.key} is being built by another process and was not removed")
    label, counted = ("removed", removed) if remove else ("total", selected)
    size = console.format_size(sum(summary.num_bytes for summary in counted))
    console.say(f"{home}: {label} {console.pluralize(len(counted), 'store')}, {size}")


def _show(per_source: Mapping[str, dict[str, Any]], total: dict[str, Any]) -> None:
    # Sources are numbered, because paths are too long for every table.
    rows = {str(number): metrics for number, metrics in enumerate(per_source.values(), 1)}
    sizes = [
        [number, name, metrics["files"], console.format_size(metrics["bytes"])]
        for (number, metrics), name in zip(rows.items(), per_source, strict=True)
    ]
    console.show(console.table("Data", ["#", "name", "files", "size"], sizes, numbers=2))
    if len(rows) > 1:
        rows["total"] = total
    columns = ["#", "schema", "records", "single-turn", "multi-turn", "duplicates", "invalid"]
    records = [
        [
            number,
            ", ".join(metrics["schemas"]),
            *(metrics[name] for name in ("records", "single_turn", "multi_turn")),
            f"{'' if metrics['duplicates_are_exact'] else 'about '}{metrics['duplicates']:,}",
            metrics["invalid_records"],
        ]
        for number, metrics in rows.items()
    ]
    console.show(console.table("Records", columns, records, numbers=5))
    _show_lengths("characters", "Chinese", rows, lambda metrics: f"{metrics['chinese_share']:.0%}")
    if total["tokens"]:
        _show_lengths("tokens", "characters per token", rows, _characters_per_token)
    if total["invalid_records"]:
        reasons = [
            ["\n".join(records["first"]), reason, records["records"]]
            for reason, records in total["invalid_reasons"].items()
        ]
        columns = ["first", "reason", "records"]
        console.show(console.table("Invalid records", columns, reasons, numbers=1))
    if total["unused_keys"]:
        unused = [
            [number, key, count]
            for number, metrics in zip(rows, per_source.values(), strict=False)
            for key, count in metrics["unused_keys"].items()
        ]
        columns = ["#", "key", "records"]
        console.show(console.table("Unused keys", columns, unused))
    for reason, count in total["skipped"].items():
        console.say(f"token counts exclude {console.pluralize(count, 'record')}: {reason}")
    for number, metrics in zip(rows, per_source.values(), strict=False):
        for sample in metrics["samples"]:
            console.say(f"\n#{number}: {sample}")


def _show_lengths(
    unit: str,
    ratio: str,
    rows: Mapping[str, dict[str, Any]],
    ratio_of: Callable[[dict[str, Any]], object],
) -> None:
    columns = ["#", ratio, "median", "90 %", "99 %", "maximum", "total"]
    lengths = [
        [number, ratio_of(metrics), *metrics[unit].values()] for number, metrics in rows.items()
    ]
    console.show(console.table(f"{unit.capitalize()} per record", columns, lengths, numbers=6))


def _characters_per_token(metrics: dict[str, Any]) -> float:
    return metrics["characters"]["total"] / max(metrics["tokens"]["total"], 1)
