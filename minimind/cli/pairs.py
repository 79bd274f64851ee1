"""`minimind data pairs MODEL DATA… --out FILE`: preference pairs from a model's own answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import typer

from minimind.cli import console
from minimind.cli.downloads import Yes, ensure_downloaded
from minimind.cli.options import AnswerSeed, AnswerTemperature, Device, MaxNewTokens
from minimind.cli.terminal import strip_controls
from minimind.errors import UsageError

_SUFFIX = ".jsonl"
_CHANGEABLE = ("version", "device", "dtype")  # without invalidating answers


def pairs(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Model or run directory that answers; DIR+ADAPTER with a LoRA adapter; URL or "
            "URL#NAME of a service.",
        ),
    ],
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA",
            help="Conversations: files, folders, globs (quoted) or dataset names.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="FILE", help="JSON Lines file; an interrupted command is continued."),
    ],
    limit: Annotated[
        int, typer.Option(min=1, help="Answer at most N conversations, evenly spaced.")
    ] = 2_000,
    temperature: AnswerTemperature = 0.0,
    seed: AnswerSeed = 0,
    max_new_tokens: MaxNewTokens = 256,
    device: Device = "auto",
    yes: Yes = False,
) -> None:
    """Make preference pairs from a model's own answers.

    The answer of the data is chosen, that of the model rejected.
    """
    from minimind.cli.models import is_service
    from minimind.evaluation.own_answers import partial_file

    if out.suffix != _SUFFIX:
        raise UsageError(f"--out {out}: the pairs are JSON Lines; choose a name with {_SUFFIX}")
    if out.exists() and not partial_file(out).exists():
        raise UsageError(f"--out {out} exists; choose another file, or remove it")
    ensure_downloaded(data, yes)
    try:
        num_failed = write_own_pairs(
            model,
            data,
            out,
            limit=limit,
            device=device,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
    except KeyboardInterrupt:
        console.say("stopped; run the same command again to continue")
        raise typer.Exit(130) from None
    trained = model if Path(model).is_dir() and not is_service(model) else "MODEL"
    command = console.command(
        "dpo", "dpo.loss=unlikelihood", "--model", trained, "--data", out, "--out", "DIR"
    )
    console.say(f"Train on them: {command}")
    if num_failed:
        console.say("Run the same command again to repeat those that failed")
        raise typer.Exit(1)


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
    variables: Mapping[str, str] = MappingProxyType({}),
    replace: bool = False,
) -> int:
    """Write the pairs with a progress bar, report all counts, and return that of failures.

    variables, replace: see read_conversations and write_pairs.
    """
    from minimind.cli.models import open_model, report_dropped
    from minimind.evaluation.own_answers import read_conversations, write_pairs
    from minimind.evaluation.tasks import GenerationConfig

    opened = open_model(model, device)
    read = read_conversations(data, limit, variables)
    # The same answers are continued on another device or with another version.
    identity = {k: v for k, v in opened.identity().items() if k not in _CHANGEABLE}
    reporter = console.RichReporter()
    reporter.start("own answers", len(read.conversations), unit="answer")
    try:
        counts = write_pairs(
            opened,
            read,
            out,
            generation=GenerationConfig(max_new_tokens, temperature, seed),
            identity=identity,
            replace=replace,
            progress=reporter.progress,
        )
    finally:
        reporter.stop()
        report_dropped(opened)
    notes = [
        f"{console.pluralize(count, noun)}{detail}"
        for count, noun, detail in (
            (counts.cut, "answer", f" cut off after {max_new_tokens} tokens"),
            (counts.equal, "answer", " left out, equal to that of the data"),
            (counts.empty, "empty answer", " left out"),
            (counts.failed, "failure", ""),
            (counts.unanswerable, "conversation", " left out, impossible to answer"),
            (counts.discarded, "earlier answer", " discarded: of another model or to other data"),
            (read.unsuitable, "record", " left out, without a supervised answer at the end"),
            (read.with_variables, "record", " left out, with template variables"),
            (read.invalid.total, "invalid record", f", the first: {read.invalid.first}"),
        )
        if count
    ]
    if counts.first_error:
        notes.append(f"the first error: {counts.first_error}")
    answered = console.pluralize(len(read.conversations), "conversation")
    written = f"{console.pluralize(counts.pairs, 'pair')} from {answered}, in {out}"
    console.say(strip_controls("; ".join([written, *notes])))
    return counts.failed
