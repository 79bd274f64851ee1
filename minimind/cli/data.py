"""`minimind data inspect`, `get` and `stores`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from minimind.cli import console
from minimind.errors import UsageError

app = typer.Typer(help="Inspect data, download exams, list token stores.", no_args_is_help=True)


@app.command()
def inspect(
    data: Annotated[
        list[str], typer.Argument(metavar="DATA", help="Files, folders or globs (quoted).")
    ],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer or model directory, to count tokens too.")
    ] = None,
    schema: Annotated[str, typer.Option(help="Schema of the records, or 'auto'.")] = "auto",
    samples: Annotated[int, typer.Option(min=0, help="Records shown of each DATA.")] = 3,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    """Show what data holds: schemas, counts, lengths, copies, bad lines, samples."""
    from minimind.data.input_files import list_files
    from minimind.data.schemas import SCHEMAS
    from minimind.data.stats import DatasetStats, inspect_data
    from minimind.tokenizer import Tokenizer

    if schema not in ("auto", *SCHEMAS):
        raise UsageError(f"--schema {schema} is unknown; known are auto, {', '.join(SCHEMAS)}")
    words = Tokenizer.load(tokenizer) if tokenizer else None
    files = [file for path in data for file in list_files(path)]
    whole = DatasetStats()
    parts: dict[str, dict[str, Any]] = {}
    with console.make_progress("byte") as bar:
        task = bar.add_task("reading", total=sum(file.stat().st_size for file in files), note="")
        for path in dict.fromkeys(data):
            found = inspect_data(
                path,
                schema=schema,
                tokenizer=words,
                num_samples=samples,
                progress=lambda count: bar.advance(task, count),
            )
            whole.merge(found)
            parts[path] = found.metrics()
    total = whole.metrics()
    _show(parts, total)
    if json:
        console.write_json(json, {"data": parts, "total": total})


@app.command()
def get(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="ceval, cmmlu, mmlu, gsm8k.")],
    out: Annotated[Path, typer.Option(help="Where to put it.")] = Path("data"),
) -> None:
    """Download published exams for `minimind eval --data`, where there is a network."""
    from minimind.data.hub import PUBLISHED, download

    for name in names:
        place = download(name, out)
        moving = "" if PUBLISHED[name].is_pinned else " (the newest version, not a fixed one)"
        console.say(f"{name}: {place}{moving}")


@app.command()
def stores(
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="KEY", help="Stores by key; default: all.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Folder of token stores; default: the cache.")
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove them; training makes them again.")
    ] = False,
) -> None:
    """List the token stores on this machine, or remove them."""
    from datetime import datetime

    from minimind.data.store import default_folder
    from minimind.data.store_list import list_stores, remove_store

    home = store or default_folder()
    found = list_stores(home)
    for key in keys or []:
        if not any(one.key.startswith(key) for one in found):
            raise UsageError(f"{home} holds no store {key}; leave out KEY to list those it holds")
    chosen = [one for one in found if not keys or one.key.startswith(tuple(keys))]
    rows = [
        [
            one.key[:8],
            one.kind,
            one.tokens,
            f"{one.num_bytes / 1e6:,.1f}",
            f"{datetime.fromtimestamp(one.created):%Y-%m-%d %H:%M}",
            "\n".join([*one.files[:3], *(["…"] if len(one.files) > 3 else [])]),
        ]
        for one in chosen
    ]
    columns = ["key", "kind", "tokens", "MB", "made", "data"]
    if rows:
        console.show(console.table(f"Token stores in {home}", columns, rows))
    removed = [one for one in chosen if remove and remove_store(home, one.key)]
    for one in chosen if remove else []:
        if one not in removed:
            console.say(f"{one.key} is being made by another process, and was not removed")
    verb, some = ("removed", removed) if remove else ("in all", chosen)
    megabytes = sum(one.num_bytes for one in some) / 1e6
    console.say(
        f"{home}: {verb} {console.count(len(some), 'store', 'stores')}, {megabytes:,.1f} MB"
    )


def _show(parts: Mapping[str, dict[str, Any]], total: dict[str, Any]) -> None:
    # Numbers stand for the names, which are long.
    rows = {str(number): metrics for number, metrics in enumerate(parts.values(), 1)}
    sizes = [
        [number, name, metrics["files"], f"{metrics['bytes'] / 1e6:,.1f}"]
        for (number, metrics), name in zip(rows.items(), parts, strict=True)
    ]
    console.show(console.table("Data", ["#", "name", "files", "MB"], sizes, numbers=2))
    if len(rows) > 1:
        rows["all"] = total
    columns = ["#", "schema", "records", "one turn", "more turns", "copies", "bad lines"]
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
    _show_lengths("characters", "Chinese", rows, lambda f: f"{f['chinese_share']:.0%}")
    if total["tokens"]:
        _show_lengths("tokens", "characters a token", rows, _characters_a_token)
    if total["invalid_records"]:
        reasons = [
            ["\n".join(found["first"]), reason, found["records"]]
            for reason, found in total["invalid_reasons"].items()
        ]
        columns = ["first seen in", "reason", "lines"]
        console.show(console.table("Bad lines", columns, reasons, numbers=1))
    if total["unused_keys"]:
        unused = [
            [number, key, count]
            for number, metrics in zip(rows, parts.values(), strict=False)
            for key, count in metrics["unused_keys"].items()
        ]
        columns = ["#", "key", "records"]
        console.show(console.table("Keys that are not used", columns, unused))
    for reason, count in total["skipped"].items():
        left_out = console.count(count, "record", "records")
        console.say(f"tokens are without {left_out}: {reason}")
    for number, metrics in zip(rows, parts.values(), strict=False):
        for sample in metrics["samples"]:
            console.say(f"\n#{number}: {sample}")


def _show_lengths(
    unit: str,
    share: str,
    rows: Mapping[str, dict[str, Any]],
    share_of: Callable[[dict[str, Any]], object],
) -> None:
    columns = ["#", share, "median", "90 %", "99 %", "longest", "total"]
    lengths = [[number, share_of(f), *f[unit].values()] for number, f in rows.items()]
    console.show(console.table(f"{unit.capitalize()} a record", columns, lengths, numbers=6))


def _characters_a_token(metrics: dict[str, Any]) -> float:
    return metrics["characters"]["total"] / max(metrics["tokens"]["total"], 1)
