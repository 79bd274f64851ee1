"""`minimind report RUN…`: an HTML and Markdown report on training runs."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.cli import console
from minimind.cli.options import Json
from minimind.errors import UsageError
from minimind.files import write_json


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Run directories, folders of run directories, or results of minimind eval.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The HTML file; Markdown is written next to it. Default: report.html in the run."
        ),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(metavar="PER_HOUR", min=0, help="Cost of an hour of training."),
    ] = None,
    json: Json = None,
) -> None:
    """Report on runs: curves, benchmarks, samples, memory, cost. Several runs share axes."""
    from minimind.reporting.report import make_report

    if out and out.suffix.lower() == ".md":
        raise UsageError(
            f"{out} is the name of the Markdown file beside the page; give "
            f"{out.with_suffix('.html')}"
        )
    if out and out.with_suffix(".md").exists() and not out.exists():
        raise UsageError(
            f"{out.with_suffix('.md')} exists and would be replaced by the report in Markdown; "
            "give another --out, or move it away first"
        )
    result = make_report(runs, price=price)
    path = out or (runs[0] if len(runs) == 1 else Path("out")) / "report.html"
    result.write(path)
    if json:
        write_json(json, result.metrics)
    for problem in result.problems:
        console.say(f"problem: {problem}")
    console.say(f"The report: {path}, and as Markdown {path.with_suffix('.md')}")
    if not result.complete:
        raise typer.Exit(1)
