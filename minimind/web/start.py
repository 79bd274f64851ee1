"""Starts what the page needs: a service, unless there is one, and Streamlit."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from minimind.environment import KEY_VARIABLE
from minimind.errors import ResourceError, ServiceError
from minimind.paths import data_folder

URL_VARIABLE = "MINIMIND_URL"
TOKEN_VARIABLE = "MINIMIND_WEB_TOKEN"
_END_SECONDS = 6


@contextlib.contextmanager
def service(models: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """(URL, key) of a service of our own, which ends with this block, or with this process.

    Raises ServiceError, with what it said, when it does not start.
    """
    key = secrets.token_urlsafe(32)
    folder = data_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = folder / "service.log"
    with log.open("w", encoding="utf-8") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "minimind", "serve", "--port", "0", "--exit-with-stdin", "--"]
            + [str(model) for model in models],
            stdin=subprocess.PIPE,  # its end is the end of the service
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            env=os.environ | {KEY_VARIABLE: key},
        )
    assert child.stdin
    assert child.stdout
    try:
        line = child.stdout.readline()
        if not line:
            child.wait()
            raise ServiceError(_last_words(log))
        yield line.split()[-1], key
    finally:
        child.stdin.close()
        try:
            child.wait(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()


def _last_words(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").splitlines()
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return told[-1] if told else f"the service did not start; {log} says why"


def show_page(url: str, key: str | None, port: int) -> None:
    """Serve the page on this machine, as a client of that service, until it is stopped.

    The page shows nothing without the token in the address that is printed: any user of this
    machine can open the port.
    """
    from streamlit.web import cli

    try:
        with socket.socket() as place:
            if os.name == "posix":  # a page that has just ended is no reason
                place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(("127.0.0.1", port))
    except OSError as error:
        raise ResourceError(
            f"cannot listen at 127.0.0.1, port {port}: {error.strerror or error}. "
            "Give another --port, or stop what listens there"
        ) from error
    token = secrets.token_urlsafe(32)
    os.environ |= {URL_VARIABLE: url, TOKEN_VARIABLE: token}
    if key is not None:
        os.environ[KEY_VARIABLE] = key
    print(f"The page: http://127.0.0.1:{port}/?token={token}", flush=True)
    settings = {
        "server.address": "127.0.0.1",
        "server.port": port,
        "server.headless": "true",  # opens no browser, asks for no e-mail address
        "server.fileWatcherType": "none",
        # Else a second run begins before the first has kept what it was writing.
        "runner.fastReruns": "false",
        "browser.gatherUsageStats": "false",
        "logger.hideWelcomeMessage": "true",  # its address lacks the token
        "client.toolbarMode": "minimal",
        "client.showErrorDetails": "none",
        "global.developmentMode": "false",
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    cli.main(["run", str(Path(__file__).with_name("page.py")), *flags], standalone_mode=False)
