"""`minimind push MODEL OWNER/NAME`: publish a model with a generated model card."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from minimind.cli import console
from minimind.cli.options import Model
from minimind.errors import UsageError


def push(
    model: Model,
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Repository; created if there is none.")
    ],
    hub: Annotated[
        Literal["hf", "modelscope"], typer.Option(help="Hugging Face (hf) or modelscope.")
    ] = "hf",
    licence: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="Licence of the model, such as apache-2.0."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Create a repository that only you can see.")
    ] = False,
    preview: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the model card to this folder, and send nothing."),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Publish without asking, despite licence conflicts.")
    ] = False,
) -> None:
    """Publish a model with a generated model card."""
    from minimind.export.model_card import make_model_card
    from minimind.export.push import check_repository_name, files_of
    from minimind.export.push import push as upload
    from minimind.files import write_atomically
    from minimind.model import resolve_model_directory
    from minimind.model.directory import check_weights

    check_repository_name(repository)
    directory = resolve_model_directory(model)
    check_weights(directory)
    card = make_model_card(model, directory, repository, hub=hub, licence=licence)
    for conflict in card.conflicts:
        console.say(f"licence: {conflict}")
    if preview:
        if taken := [name for name in card.files if (preview / name).exists()]:
            raise UsageError(
                f"{preview / taken[0]} already exists; delete it or choose another DIR"
            )
        for name, text in card.files.items():
            write_atomically(preview / name, text)
        console.say(f"The model card: {preview / 'README.md'}. Nothing was sent.")
        return
    files = files_of(directory)
    if directory / "README.md" in files:
        console.say(f"{directory / 'README.md'} is used as the model card")
    size = sum(file.stat().st_size for file in files)
    console.say(f"{len(files)} files, {size / 1e6:,.1f} MB, to {hub}:{repository}")
    if not licence:
        console.say("The model card states no licence; --license ID adds one.")
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(
                "publishing needs a confirmation, and standard input is not a terminal; "
                "add --yes, or --preview DIR to see the model card"
            )
        typer.confirm("Publish?", abort=True)
    address = upload(directory, card.files, repository, hub=hub, licence=licence, private=private)
    console.say(f"Published: {address}")
