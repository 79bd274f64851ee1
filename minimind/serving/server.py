"""The server process: sockets, signals, shutdown."""

import asyncio
import contextlib
import errno
import gc
import math
import os
import signal
import socket
import sys
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
from minimind.serving.protocol import protocol_with_timeouts

_CANCELLED_SECONDS = 1  # for cancelled answers to end; then open connections are cut
_ENGINE_CLOSE_SECONDS = 1.0  # for all engines together
# A host name may resolve to an address that this machine lacks, such as ::1 without IPv6.
_ADDRESS_MISSING = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind sockets to every address of `host` on this machine; port 0 takes a free port for all.

    Raises ResourceError when an address is in use or there is none.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # IPv4 first: the first address is the one shown to the user.
        entries = sorted(dict.fromkeys(found), key=lambda entry: entry[0] != socket.AF_INET)
        for entry in entries:
            free_port = sockets[0].getsockname()[1] if sockets else port
            try:
                sockets.append(_bound_socket(entry, free_port, is_only=len(entries) == 1))
            except OSError as error:
                is_last_chance = entry == entries[-1] and not sockets
                if error.errno not in _ADDRESS_MISSING or is_last_chance:
                    raise
    except OSError as error:
        for bound in sockets:
            bound.close()
        raise _cannot_listen(host, port, error) from error
    return sockets


def listen(sockets: Sequence[socket.socket]) -> None:
    """Accept connections. Raises ResourceError: another program may have bound the port as well."""
    for bound in sockets:
        try:
            bound.listen()
        except OSError as error:
            host, port = bound.getsockname()[:2]
            raise _cannot_listen(host, port, error) from error


def _cannot_listen(host: str, port: int, error: OSError) -> ResourceError:
    return ResourceError(
        f"cannot listen at {host}, port {port}: {error.strerror or error}. "
        "Choose another --port, or stop the program that uses it"
    )


def _bound_socket(entry: Any, port: int, *, is_only: bool) -> socket.socket:
    """Return a socket bound to one entry of `getaddrinfo`."""
    family, kind, protocol, _, address = entry
    # With the protocol: asyncio sets TCP_NODELAY only on sockets whose protocol is TCP.
    bound = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # on Windows, SO_REUSEADDR would let two servers share a port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and not is_only:  # IPv4 has its own socket
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((address[0], port, *address[2:]))
    except OSError:
        bound.close()
        raise
    return bound


def url_of(sockets: Sequence[socket.socket]) -> str:
    """Return the URL of the first socket, such as http://127.0.0.1:8000."""
    host, port = sockets[0].getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves until a signal or an engine failure, then shuts down and closes the engines.

    Shutdown takes at most `limits.grace_seconds` and three seconds more. After an engine failure,
    /health reports the reason for `limits.failed_seconds`; then the process exits with status 1, so
    that a supervisor restarts it.
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
        self._exit_time: float | None = None  # set when an engine has failed
        shutdown_seconds = math.ceil(self._limits.grace_seconds) + _CANCELLED_SECONDS
        app = create_app(self._service, keys=keys, limits=self._limits, origins=origins)
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol_with_timeouts(self._limits),
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=shutdown_seconds,
            )
        )

    def serve_at(self, sockets: Sequence[socket.socket]) -> int:
        """Serve until SIGTERM, Ctrl-C or `should_exit`. Return the exit status of the process.

        The status is 1 after an engine failure, else 0.
        """
        log("listening", url=url_of(sockets), models=list(self._service.models))
        try:
            self.run(sockets=list(sockets))
        finally:
            self._service.preparation.close()
            deadline = time.monotonic() + _ENGINE_CLOSE_SECONDS
            for model in self._service.models.values():
                model.engine.close(max(0.0, deadline - time.monotonic()))
            log("ended")
        return 0 if self._exit_time is None else 1

    async def on_tick(self, counter: int) -> bool:
        """Return True to stop serving; uvicorn calls this ten times per second."""
        if self._exit_time is None and (reason := self._service.failure) is not None:
            LOGGER.error("failed", extra={"fields": {"reason": reason}})
            self._exit_time = time.monotonic() + self._limits.failed_seconds
        has_failed = self._exit_time is not None and time.monotonic() >= self._exit_time
        return await super().on_tick(counter) or has_failed

    async def shutdown(self, sockets: Any = None) -> None:
        self._service.is_stopping = True
        log("stopping")
        loop = asyncio.get_running_loop()
        loop.call_later(self._limits.grace_seconds, self._service.cancel_all)
        await super().shutdown(sockets)


def prioritize_event_loop() -> None:
    """Keep garbage collection and decoding from delaying the event loop; call after loading.

    A full collection over the objects of torch's modules took 180 ms, so they are frozen. Decoding
    threads get a lower priority, because they would occupy every core.
    """
    gc.collect()
    gc.freeze()
    lower_thread_priority()


@contextlib.contextmanager
def exit_on_signal() -> Iterator[None]:
    """Exit with status 0 on SIGTERM and 130 on Ctrl-C, also while models are loaded.

    SystemExit keeps its status. Skips the interpreter's shutdown, which takes seconds on a busy
    machine and would save nothing.
    """

    def exit_process(number: int, frame: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, exit_process)
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as reason:
        sys.stdout.flush()
        os._exit(int(reason.code or 0) if isinstance(reason, SystemExit) else 130)
