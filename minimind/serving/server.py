"""A process that serves: its socket, its signals, its end."""

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import uvicorn

from minimind.errors import ResourceError
from minimind.inference.engine import step_back
from minimind.serving.app import Service, create_app
from minimind.serving.limits import Limits
from minimind.serving.logs import log
from minimind.serving.models import ServedModel
from minimind.serving.protocol import bounded_protocol

_LATEST_END_SECONDS = 3  # after this what still runs is cut off


def bind(host: str, port: int) -> socket.socket:
    """A socket at that place; port 0 takes a free one. Raises ResourceError when there is none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # With the protocol said, for asyncio switches off Nagle's delay only where it sees TCP.
        found = socket.socket(family, kind, protocol)
        if os.name == "posix":  # elsewhere it would let two servers have one port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise ResourceError(
            f"cannot listen at {host}, port {port}: {error.strerror or error}. "
            "Give another --port, or stop what listens there"
        ) from error
    return found


def url_of(listening: socket.socket) -> str:
    """Where a socket is reached, such as http://127.0.0.1:8000."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves until it is told to stop, then ends within five seconds and closes the engines."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        *,
        keys: Sequence[str] = (),
        origins: Sequence[str] = (),
        limits: Limits | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._service = Service(models)
        app = create_app(self._service, keys=keys, limits=self._limits, origins=origins)
        super().__init__(
            uvicorn.Config(
                app,
                http=bounded_protocol(self._limits),
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=_LATEST_END_SECONDS,
            )
        )

    def serve_at(self, listening: socket.socket) -> None:
        """Serve until SIGTERM, Ctrl-C, or `should_exit`."""
        log("listening", url=url_of(listening), models=list(self._service.models))
        try:
            self.run(sockets=[listening])
        finally:
            for model in self._service.models.values():
                model.engine.close()
            log("ended")

    async def shutdown(self, sockets: Any = None) -> None:
        self._service.is_stopping = True
        log("stopping")
        loop = asyncio.get_running_loop()
        loop.call_later(self._limits.grace_seconds, self._service.cancel_all)
        await super().shutdown(sockets)


def answer_first() -> None:
    """Let the event loop wait for nothing long in this process, whose models are loaded.

    What is there stays, torch's modules above all: to search it for garbage, as Python does once in
    a while, took 180 ms. And decoding would keep all cores.
    """
    gc.collect()
    gc.freeze()
    step_back()


@contextlib.contextmanager
def ends_at_once() -> Iterator[None]:
    """SIGTERM ends this process with status 0, Ctrl-C with 130, also while models are loaded.

    Python is not taken apart: that takes seconds on a busy machine, and nothing is left to keep.
    """

    def leave(number: int, frame: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as end:
        sys.stdout.flush()
        os._exit(0 if isinstance(end, SystemExit) else 130)


def end_with_stdin() -> None:
    """End this process when its standard input is closed: with the one that started it."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="stdin", daemon=True).start()
