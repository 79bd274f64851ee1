"""A process that serves: its socket, its signals, its end."""

import asyncio
import contextlib
import errno
import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import uvicorn

from minimind.errors import ResourceError
from minimind.inference.engine_thread import lower_thread_priority
from minimind.serving.app import Service, create_app
from minimind.serving.limits import Limits
from minimind.serving.logs import LOGGER, log
from minimind.serving.models import ServedModel
from minimind.serving.protocol import bounded_protocol

_LATEST_END_SECONDS = 3  # after this what still runs is cut off
_CLOSE_SECONDS = 1.0  # for the engines to end, all together
# What a name may lead to that this machine lacks: ::1 where IPv6 is switched off.
_NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets at every address that `host` has on this machine; port 0 takes a free one for all.

    Raises ResourceError when an address is taken, or when there is none.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # IPv4 first: the first address is the one that is shown.
        entries = sorted(dict.fromkeys(found), key=lambda entry: entry[0] != socket.AF_INET)
        for entry in entries:
            free_port = sockets[0].getsockname()[1] if sockets else port
            try:
                sockets.append(_bound(entry, free_port, is_only=len(entries) == 1))
            except OSError as error:
                is_last_chance = entry == entries[-1] and not sockets
                if error.errno not in _NO_SUCH_ADDRESS or is_last_chance:
                    raise
    except OSError as error:
        for one in sockets:
            one.close()
        raise ResourceError(
            f"cannot listen at {host}, port {port}: {error.strerror or error}. "
            "Give another --port, or stop what listens there"
        ) from error
    return sockets


def _bound(entry: Any, port: int, *, is_only: bool) -> socket.socket:
    """A socket at one of the addresses that `getaddrinfo` finds."""
    family, kind, protocol, _, address = entry
    # With the protocol: asyncio switches off Nagle's delay only where it sees TCP.
    found = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would let two servers have one port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and not is_only:  # IPv4 has a socket of its own
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        found.bind((address[0], port, *address[2:]))
    except OSError:
        found.close()
        raise
    return found


def url_of(listening: Sequence[socket.socket]) -> str:
    """Where the first socket is reached, such as http://127.0.0.1:8000."""
    host, port = listening[0].getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves until it is told to stop, then ends within five seconds and closes the engines.

    After an error that stops an engine, /health says so for `limits.failed_seconds`; then the
    process ends with status 1, so that a supervisor starts it again.
    """

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
        self._latest_end: float | None = None  # once an engine has failed
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

    def serve_at(self, listening: Sequence[socket.socket]) -> int:
        """Serve until SIGTERM, Ctrl-C, or `should_exit`. Return the process's exit status.

        It is 1 when an engine has failed, else 0.
        """
        log("listening", url=url_of(listening), models=list(self._service.models))
        try:
            self.run(sockets=list(listening))
        finally:
            end = time.monotonic() + _CLOSE_SECONDS
            for model in self._service.models.values():
                model.engine.close(max(0.0, end - time.monotonic()))
            log("ended")
        return 0 if self._latest_end is None else 1

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop serving; called ten times a second."""
        if self._latest_end is None and (reason := self._service.failure) is not None:
            LOGGER.error("failed", extra={"fields": {"reason": reason}})
            self._latest_end = time.monotonic() + self._limits.failed_seconds
        is_over = self._latest_end is not None and time.monotonic() >= self._latest_end
        return await super().on_tick(counter) or is_over

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
    lower_thread_priority()


@contextlib.contextmanager
def ends_at_once() -> Iterator[None]:
    """SIGTERM ends this process with status 0, Ctrl-C with 130, also while models are loaded.

    SystemExit ends it with its own status. Python is not taken apart: that takes seconds on a busy
    machine, and nothing is left to keep.
    """

    def leave(number: int, frame: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as end:
        sys.stdout.flush()
        os._exit(int(end.code or 0) if isinstance(end, SystemExit) else 130)


def end_with_stdin() -> None:
    """End this process when its standard input is closed: with the one that started it."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="stdin", daemon=True).start()
