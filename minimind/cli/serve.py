"""`minimind serve MODEL…`: serve models over HTTP with OpenAI's API."""

import os
from pathlib import Path
from typing import Annotated

import typer

from minimind.cli.options import Context, Device, Int8, RopeScaling
from minimind.environment import KEY_VARIABLE

Models = Annotated[
    list[Path],
    typer.Argument(metavar="MODEL…", help="Models, runs or LoRA adapters, or a folder of them."),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=DIR", help="Serve a LoRA adapter of the only MODEL under NAME (repeatable)."
    ),
]
Host = Annotated[
    str, typer.Option(help="Address to bind; other addresses than localhost need an API key.")
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 chooses a free one.")]
APIKeys = Annotated[
    list[str] | None,
    typer.Option(
        help=f"API key that clients must send (repeatable). Prefer {KEY_VARIABLE}: arguments show "
        "up in `ps`."
    ),
]
CORSOrigins = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ORIGIN", help="Allow cross-origin (CORS) requests from ORIGIN (repeatable)."
    ),
]
Slots = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=256,
        help="Maximum concurrent sequences per model; default: up to 16, as memory allows.",
    ),
]
QueueLength = Annotated[
    int,
    typer.Option(min=0, max=100_000, help="Maximum queued answers per model; more get status 429."),
]


def serve(
    models: Models,
    adapter: Adapters = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: APIKeys = None,
    cors: CORSOrigins = None,
    slots: Slots = None,
    queue: QueueLength = 64,
    device: Device = "auto",
    int8: Int8 = False,
    context: Context = None,
    rope_scaling: RopeScaling = None,
    exit_with_stdin: Annotated[bool, typer.Option("--exit-with-stdin", hidden=True)] = False,
) -> None:
    """Serve models over HTTP with OpenAI's API. API documentation is at /docs."""
    from minimind.serving import server
    from minimind.serving.auth import check_exposure, normalized_origin
    from minimind.serving.limits import Limits
    from minimind.serving.logs import log_to_stderr
    from minimind.serving.models import find_adapters, find_models, load_models
    from minimind.signals import exit_when_stdin_closes

    keys = api_key or [key for key in [os.environ.get(KEY_VARIABLE, "")] if key]
    check_exposure(host, keys)
    origins = [normalized_origin(origin) for origin in cors or []]
    sources = find_models(models)
    sources |= find_adapters(adapter or [], sources)
    sockets = server.bind(host, port)  # before loading, which takes long: the port may be in use
    with server.exit_on_signal():
        if exit_with_stdin:
            exit_when_stdin_closes(gracefully=True)
        log_to_stderr()
        served = load_models(
            sources,
            device=device,
            slots=slots,
            max_queued=queue,
            int8=int8,
            context=context,
            rope_scaling=rope_scaling,
        )
        server.listen(sockets)
        for name in served:
            print(f"{name}: {server.url_of(sockets)}/v1", flush=True)
        for name, model in served.items():
            print(f"{name}: {model.cache_summary}", flush=True)
            print(f"{name}: {model.engine.model.invariance_note}", flush=True)
        server.prioritize_event_loop()
        limits = Limits(queue=queue)
        running = server.Server(served, keys=keys, origins=origins, limits=limits)
        raise SystemExit(running.serve_at(sockets))
