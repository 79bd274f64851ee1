"""`minimind web [MODEL]`: chat with models in a browser."""

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
        typer.Option(
            help=f"Chat with an OpenAI-compatible service at this URL; API key in {KEY_VARIABLE}."
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 8501,
) -> None:
    """Chat with models in a browser. The page is served on localhost, with a token in its URL."""
    if bool(models) == bool(url):
        raise UsageError("give either a MODEL, or a service with --url URL")
    if importlib.util.find_spec("streamlit") is None:
        raise UsageError(f"the page needs Streamlit; install it: {install_line('web')}")
    from minimind.web import start
    from minimind.web.client import Client

    if url:
        Client(url)  # raises UsageError for an invalid URL
        start.show_page(url, os.environ.get(KEY_VARIABLE), port)
    else:
        with start.service(models or []) as (own_url, key):
            start.show_page(own_url, key, port)
