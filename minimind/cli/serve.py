"""`minimind serve MODEL…`: models over HTTP, as OpenAI's API."""

import os
from pathlib import Path
from typing import Annotated

import typer

from minimind.cli.options import Context, Device, Int8, RopeScaling, validated_context
from minimind.environment import KEY_VARIABLE


def serve(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL…", help="Models, runs or LoRA adapters, or a folder of them."
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="LoRA adapter of the one MODEL, served under a name of its own; several allowed.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; beyond this machine a key is needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Key that requests must bring; several allowed. Or set {KEY_VARIABLE}, "
            "which no list of processes shows.",
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Web pages of this origin may ask from a browser."),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=256,
            help="Maximum concurrent sequences per model; default: up to 16, as memory allows.",
        ),
    ] = None,
    queue: Annotated[
        int, typer.Option(min=0, max=100_000, help="Answers that may wait; more get status 429.")
    ] = 64,
    device: Device = "auto",
    int8: Int8 = False,
    context: Context = None,
    rope_scaling: RopeScaling = None,
    end_with_stdin: Annotated[bool, typer.Option("--end-with-stdin", hidden=True)] = False,
) -> None:
    """Serve models over HTTP, as OpenAI's API. Docs are at /docs."""
    keys = api_key or [key for key in [os.environ.get(KEY_VARIABLE, "")] if key]

    from minimind.serving import server
    from minimind.serving.auth import check_exposure
    from minimind.serving.limits import Limits
    from minimind.serving.logs import log_to_stderr
    from minimind.serving.models import find_adapters, find_models, load_models

    check_exposure(host, keys)
    context = validated_context(context, rope_scaling)
    sources = find_models(models)
    sources |= find_adapters(adapter or [], sources)
    listening = server.bind(host, port)
    with server.ends_at_once():
        if end_with_stdin:
            server.end_with_stdin()
        log_to_stderr()
        served = load_models(
            sources,
            device=device,
            slots=slots,
            waiting=queue,
            int8=int8,
            context=context,
            rope_scaling=rope_scaling,
        )
        for name in served:
            print(f"{name}: {server.url_of(listening)}/v1", flush=True)
        for name, model in served.items():
            print(f"{name}: {model.cache}", flush=True)
            print(f"{name}: {model.engine.model.promise}", flush=True)
        server.answer_first()
        limits = Limits(queue=queue)
        running = server.Server(served, keys=keys, origins=cors or [], limits=limits)
        raise SystemExit(running.serve_at(listening))
