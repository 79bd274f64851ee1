"""`minimind web [MODEL]`: a page to talk with models in."""

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer

from minimind.environment import KEY_VARIABLE
from minimind.errors import UsageError, install_line


def web(
    models: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[MODEL…]", help="Models, runs or LoRA adapters, or a folder of them."
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help=f"Talk to the service there instead; its key is in {KEY_VARIABLE}."),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the page.")] = 8501,
) -> None:
    """Talk with models in a browser: a page on this machine, behind a token in its address."""
    if bool(models) == bool(url):
        raise UsageError("give a MODEL, or the --url of a service")
    if importlib.util.find_spec("streamlit") is None:
        raise UsageError(f"the page needs streamlit: {install_line('web')}")
    from minimind.web import start
    from minimind.web.client import Client

    if url:
        Client(url)  # tells now what is no URL
        start.show_page(url, os.environ.get(KEY_VARIABLE), port)
    else:
        with start.service(models or []) as (own_url, key):
            start.show_page(own_url, key, port)
