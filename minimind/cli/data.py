"""`minimind data inspect`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from minimind.cli import console
from minimind.errors import UsageError

app = typer.Typer(help="Look into data.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Look into data."""  # with this, `inspect` stays a verb of its own while it is the only one


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
    from minimind.data.inspect import Findings, inspect_data
    from minimind.data.read import list_files
    from minimind.data.schemas import SCHEMAS
    from minimind.tokenizer import Tokenizer

    if schema not in ("auto", *SCHEMAS):
        raise UsageError(
            f"--schema {schema}: there is no such; known are auto, {', '.join(SCHEMAS)}"
        )
    words = Tokenizer.load(tokenizer) if tokenizer else None
    files = [file for path in data for file in list_files(path)]
    whole = Findings()
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
            parts[path] = found.figures()
    total = whole.figures()
    _show(parts, total)
    if json:
        console.write_json(json, {"data": parts, "total": total})


def _show(parts: Mapping[str, dict[str, Any]], total: dict[str, Any]) -> None:
    rows = parts if len(parts) == 1 else {**parts, "all": total}
    columns = ["data", "schema", "records", "one turn", "more turns", "copies", "bad lines"]
    records = [
        [
            name,
            ", ".join(f["schemas"]),
            *(f["records"], f["single_turn"], f["multi_turn"]),
            f["copies"] if f["copies_are_exact"] else f"about {f['copies']:,}",
            f["bad_lines"],
        ]
        for name, f in rows.items()
    ]
    console.show(console.table("Records", columns, records, numbers=5))
    names = ["median", "p90", "p99", "max", "total"]
    lengths = [
        [name, f"{f['chinese_share']:.0%}", *(f["characters"][n] for n in names)]
        for name, f in rows.items()
    ]
    columns = ["data", "Chinese", "median", "90 %", "99 %", "longest", "total"]
    console.show(console.table("Characters a record", columns, lengths, numbers=6))
    if total["tokens"]:
        lengths = [
            [
                name,
                f["characters"]["total"] / max(f["tokens"]["total"], 1),
                *(f["tokens"][n] for n in names),
            ]
            for name, f in rows.items()
        ]
        columns[1] = "characters a token"
        console.show(console.table("Tokens a record", columns, lengths, numbers=6))
    if total["bad_lines"]:
        reasons = [
            [reason, found["lines"], "\n".join(found["first"])]
            for reason, found in total["bad_reasons"].items()
        ]
        console.show(console.table("Bad lines", ["reason", "lines", "the first"], reasons))
    for name, figures in parts.items():
        if figures["samples"]:
            console.say(f"\nSamples of {name}")
        for sample in figures["samples"]:
            console.say("  · " + sample.replace("\n", "\n    "))
