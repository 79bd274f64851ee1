"""`minimind report RUN…`: what runs did, as one page."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.cli import console


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN", help="Run directories, folders that hold some, results of minimind eval."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The page; Markdown is put beside it. Default: report.html in the run."),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(metavar="PER_HOUR", min=0, help="What an hour of training costs."),
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    """Show what runs did: curves, exams, samples, memory, cost; several on the same axes."""
    from minimind.reporting.report import make_report

    made = make_report(runs, price=price)
    page = out or (runs[0] if len(runs) == 1 else Path("out")) / "report.html"
    made.write(page)
    if json:
        console.write_json(json, made.metrics)
    for problem in made.problems:
        console.say(f"problem: {problem}")
    console.say(f"The report: {page}, and as Markdown {page.with_suffix('.md')}")
    if not made.complete:
        raise typer.Exit(1)
