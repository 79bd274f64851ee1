"""Start and end of the page's processes, and the token in its address."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest

from minimind.web.store import Answer, Conversation, Store, Turn
from tests.support.browser import Browser, page_of
from tests.support.commands import fast_python
from tests.support.services import wait_until


def test_without_the_token_only_an_error_is_shown(url: str, browser: Browser, store: Store) -> None:
    talk = Conversation(turns=[Turn("秘密", [Answer("tiny", "答案")])])
    store.save(talk)
    base, token = url.split("?token=")
    for query in ("", f"?c={talk.id}", f"?token=&c={talk.id}", f"?token={token[:-1]}&c={talk.id}",
                  f"?token={token}&token=x&c={talk.id}", f"?token=长&c={talk.id}"):  # fmt: skip
        browser.go_to(base + query)
        [alert] = browser.wait(lambda: browser.find('[data-testid="stAlert"]'))
        assert alert.text.startswith("This page is for the user who started it.")
        assert "minimind web" in alert.text
        page = browser.driver.page_source
        assert "秘密" not in page and "答案" not in page and token not in page
        assert not browser.find('[data-testid="stChatInputTextArea"]')
    # With the token, also after each action that changes the address.
    browser.open(f"{url}&c={talk.id}")
    browser.wait(lambda: len(browser.messages()) == 2)
    next(b for b in browser.find("button") if "New conversation" in b.text).click()
    browser.wait(lambda: not browser.messages())
    browser.driver.refresh()
    browser.button(f".st-key-open-{talk.id}").click()
    browser.wait(lambda: len(browser.messages()) == 2)
    assert f"token={token}" in browser.driver.current_url
    browser.driver.refresh()
    browser.wait(lambda: len(browser.messages()) == 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_service_ends_with_the_page(models_dir: Path, tmp_path: Path, number: int) -> None:
    with page_of(models_dir, home=tmp_path) as (url, process):
        page = psutil.Process(process.pid)
        end = time.monotonic() + 60
        while not (children := page.children(recursive=True)) and time.monotonic() < end:
            time.sleep(0.05)
        assert children
        wait_until(lambda: is_served(url))
        process.send_signal(number)
        process.wait(timeout=20)
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive


def is_served(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url).status_code == 200
    return False


def test_usage_errors(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    request.addfinalizer(taken.close)
    port = taken.getsockname()[1]
    for flags, message in [
        (["--url", "http://127.0.0.1:9", "--port", str(port)], f"port {port}: Address already"),
        ([], "give either a MODEL, or a service with --url URL"),
        (["a", "--url", "http://b"], "give either a MODEL, or a service with --url URL"),
        (["--url", "ftp://b"], "is not the URL of a service"),
        ([str(tmp_path / "none")], "there is no such directory"),
    ]:
        done = subprocess.run(
            [*fast_python(), "-m", "minimind", "web", *flags],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"XDG_DATA_HOME": str(tmp_path)},
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert message in done.stderr
        assert "Traceback" not in done.stderr
