"""Starts the chat page with Streamlit, and a service in a child process if none is given."""

import contextlib
import os
import secrets
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from minimind.environment import KEY_VARIABLE, python_module
from minimind.errors import ResourceError, ServiceError
from minimind.paths import data_folder

URL_VARIABLE = "MINIMIND_URL"
TOKEN_VARIABLE = "MINIMIND_WEB_TOKEN"
_SHUTDOWN_SECONDS = 6


@contextlib.contextmanager
def service(models: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Run a service for `models` in a child process and yield its (URL, API key).

    The service ends with this block, or when this process dies. Raises ServiceError with the
    service's error message if it does not start.
    """
    key = secrets.token_urlsafe(32)
    folder = data_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = folder / "service.log"
    with log.open("w", encoding="utf-8") as errors:
        child = subprocess.Popen(
            [*python_module("minimind"), "serve", "--port", "0", "--exit-with-stdin", "--"]
            + [str(model) for model in models],
            stdin=subprocess.PIPE,  # closed when this process dies, which ends the service
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            env=os.environ | {KEY_VARIABLE: key},
        )
    assert child.stdin
    assert child.stdout
    try:
        line = child.stdout.readline()  # "NAME: URL"
        if not line:
            child.wait()
            raise ServiceError(_error_in(log))
        yield line.split()[-1], key
    finally:
        child.stdin.close()
        try:
            child.wait(timeout=_SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()


def _error_in(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else f"the service did not start; see its log {log}"


def show_page(url: str, key: str | None, port: int) -> None:
    """Serve the page on localhost, as a client of the service at `url`, until interrupted.

    Every user of this machine can open the port, so the page requires the token in the printed
    address.
    """
    from streamlit.web import cli

    try:
        with socket.socket() as probe:
            if os.name == "posix":  # a port in TIME_WAIT counts as free
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    except OSError as error:
        raise ResourceError(
            f"cannot listen at 127.0.0.1, port {port}: {error.strerror or error}. "
            "Choose another --port, or stop the program that uses it"
        ) from error
    token = secrets.token_urlsafe(32)
    os.environ |= {URL_VARIABLE: url, TOKEN_VARIABLE: token}
    if key is not None:
        os.environ[KEY_VARIABLE] = key
    print(f"Open http://127.0.0.1:{port}/?token={token}", flush=True)
    settings = {
        "server.address": "127.0.0.1",
        "server.port": port,
        "server.headless": "true",  # do not open a browser or ask for an e-mail address
        "server.fileWatcherType": "none",
        # Otherwise the next run starts before the interrupted one has saved its answer.
        "runner.fastReruns": "false",
        "browser.gatherUsageStats": "false",
        "logger.hideWelcomeMessage": "true",  # it shows the address without the token
        "client.toolbarMode": "minimal",
        "client.showErrorDetails": "none",
        "global.developmentMode": "false",
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    cli.main(["run", str(Path(__file__).with_name("page.py")), *flags], standalone_mode=False)
