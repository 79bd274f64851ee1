"""`minimind data pairs MODEL DATA… --out FILE`: preference pairs from a model's own answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from minimind.cli import console
from minimind.cli.downloads import Yes, ensure_downloaded
from minimind.cli.options import Device, MaxNewTokens
from minimind.cli.terminal import strip_controls
from minimind.errors import UsageError


def pairs(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Model, DIR+ADAPTER or service (URL or URL#NAME) that answers."
        ),
    ],
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA",
            help="Conversations, as for `minimind sft`: files, folders, globs (quoted) or dataset "
            "names.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="JSON Lines file; interrupted work is continued.")
    ],
    limit: Annotated[
        int, typer.Option(min=1, help="Answer at most N conversations, evenly spaced.")
    ] = 2_000,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="Sampling temperature; 0 is greedy decoding.")
    ] = 0.0,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="The same seed gives the same answers.")
    ] = 0,
    max_new_tokens: MaxNewTokens = 256,
    device: Device = "auto",
    yes: Yes = False,
) -> None:
    """Make preference pairs: an answer of the data is chosen, the model's own rejected.

    Training on them (`minimind dpo`) reduces repetitions and other mistakes of the model.
    """
    if out.exists():
        raise UsageError(f"--out {out} exists; choose another file, or remove it")
    ensure_downloaded(data, yes)
    write_own_pairs(
        model,
        data,
        out,
        limit=limit,
        device=device,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    console.say(
        f"Train on them: {console.command('dpo', '--model', model, '--data', out, '--out', 'DIR')}"
    )


def write_own_pairs(
    model: str,
    data: Sequence[str],
    out: Path,
    *,
    limit: int,
    device: str,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
) -> None:
    """Write the pairs with a progress bar, and report what became of the conversations."""
    from minimind.cli.models import open_model, report_dropped
    from minimind.evaluation.own_answers import read_conversations, write_pairs
    from minimind.evaluation.tasks import GenerationConfig

    opened = open_model(model, device)
    conversations, invalid = read_conversations(data, limit)
    reporter = console.RichReporter()
    reporter.start("own answers", len(conversations), unit="answer")
    try:
        counts = write_pairs(
            opened,
            conversations,
            out,
            generation=GenerationConfig(max_new_tokens, temperature, seed),
            identity=opened.identity(),
            progress=reporter.progress,
        )
    finally:
        reporter.stop()
    report_dropped(opened)
    notes = [
        f"{console.pluralize(count, what)}{detail}"
        for count, what, detail in (
            (counts.equal, "answer", " equal to that of the data"),
            (counts.empty, "empty answer", ""),
            (counts.failed, "failure", f", the first: {counts.first_error}"),
            (invalid.total, "invalid record", f", the first: {invalid.first}"),
        )
        if count
    ]
    asked = console.pluralize(len(conversations), "conversation")
    made = f"{console.pluralize(counts.pairs, 'pair')} from {asked}, in {out}"
    console.say(strip_controls("; ".join([made, *notes])))
