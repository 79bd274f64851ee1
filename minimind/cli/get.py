"""`minimind get MODEL`: download a published model into a model directory."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.cli import console
from minimind.cli.downloads import check_terminal, confirm, progress_bar, total_size


def get(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="OWNER/NAME on Hugging Face, or modelscope:OWNER/NAME."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Model directory to create. [default: models/NAME]")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Commit, branch or tag; default: the latest version.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Download without asking first.")] = False,
) -> None:
    """Download a published model.

    Weights in safetensors, configuration and tokenizer.
    """
    from minimind.data.hub_models import (
        download_model,
        is_downloaded,
        list_model,
        parse_model_name,
        unfinished_folder,
    )

    repository = parse_model_name(model, revision)
    target = out or Path("models") / repository.id.rpartition("/")[2]
    if is_downloaded(repository, target):
        console.say(f"{model} is already in {target}")
        return
    check_terminal(model, yes)
    listing, files = list_model(repository, console.say)
    size = total_size(files)
    console.say(
        f"{repository.host}/{repository.id} at {listing.repository.branch[:12]}: "
        f"{console.pluralize(len(files), 'file')}, {console.format_size(size)}, "
        f"licence: {listing.licence or 'unknown'}"
    )
    confirm(size, target, yes)
    download_model(
        listing,
        files,
        target,
        requested=revision,
        progress=lambda name: progress_bar(name, unfinished_folder(target) / name),
        say=console.say,
    )
    console.say(f"{model}: {target}")
    _report_unsupported(target)


def _report_unsupported(directory: Path) -> None:
    """Say why minimind cannot run a downloaded model, if it cannot."""
    from minimind.errors import ModelError
    from minimind.model.hf_config import read_config

    if not (directory / "config.json").is_file():
        return
    try:
        read_config(directory)
    except ModelError as error:
        console.say(f"{error}. Only `minimind eval` can use it, if transformers is installed")
