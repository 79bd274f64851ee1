"""Chromium, and the chat page that it shows."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minimind.web.store import Answer, Conversation, Store, Turn
from tests.support.chromium import start_chromium
from tests.support.commands import with_fast_children


@contextlib.contextmanager
def page_of(*flags: object, home: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run `minimind web` on a free port; yield the printed address and the process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    python = with_fast_children(home)  # the service
    with (
        (home / "log").open("w") as log,
        subprocess.Popen(
            [*python, "-m", "minimind", "web", *map(str, flags), "--port", str(port)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"XDG_DATA_HOME": str(home), "OMP_NUM_THREADS": "1"},
        ) as process,
    ):
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line.startswith(f"Open http://127.0.0.1:{port}/?token="), line
            yield line.split()[-1], process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=20)
            finally:
                process.kill()


class Browser:
    """Chromium, with methods for this page."""

    def __init__(self, language: str = "en-US", width: int = 1200) -> None:
        self.driver = start_chromium(language, width)

    def open(self, url: str) -> None:
        self.go_to(url)
        self.wait(lambda: self.find('[data-testid="stChatInputTextArea"]'))

    def go_to(self, url: str) -> None:
        # The page's process may still be starting.
        self.wait(lambda: self._loads(url))

    def _loads(self, url: str) -> bool:
        from selenium.common.exceptions import WebDriverException

        with contextlib.suppress(WebDriverException):
            self.driver.get(url)
            return True
        return False

    def find(self, css: str) -> list[Any]:
        return self.driver.find_elements("css selector", css)

    def button(self, css: str) -> Any:
        return self.wait(lambda: self.find(f"{css} button"))[0]

    def press(self, css: str) -> None:
        """Click a button by script, because it moves, is out of view or is rendered again."""

        def click() -> bool:
            buttons = self.find(f"{css} button")
            if buttons:
                self.driver.execute_script("arguments[0].click()", buttons[0])
            return bool(buttons)

        self.wait(click)

    def num_enabled(self, css: str) -> int:
        """Count the visible and enabled buttons."""
        return sum(b.is_displayed() and b.is_enabled() for b in self.find(f"{css} button"))

    def shadow_buttons(self, css: str) -> list[Any]:
        """Return the buttons in the shadow DOM of a component."""
        script = (
            "return [...document.querySelectorAll(arguments[0] + ' *')].map(e => e.shadowRoot)"
            ".filter(Boolean).flatMap(r => [...r.querySelectorAll('button')])"
        )
        return self.driver.execute_script(script, css)  # type: ignore[no-any-return]

    def messages(self) -> list[str]:
        """Return the texts of all messages."""
        script = (
            "return [...document.querySelectorAll('[data-testid=stChatMessageContent]')]"
            ".map(e => e.innerText)"
        )
        return self.driver.execute_script(script)  # type: ignore[no-any-return]

    def wait(self, condition: Callable[[], Any], seconds: float = 60) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(StaleElementReferenceException):  # re-rendered meanwhile
                if result := condition():
                    return result
            assert time.monotonic() < end, f"timeout; messages: {self.messages()}"
            time.sleep(0.1)

    def ask(self, text: str) -> None:
        [box] = self.wait(lambda: self.find('[data-testid="stChatInputTextArea"]'))
        box.send_keys(text + "\n")

    def wait_until_finished(self) -> None:
        self.wait(lambda: self.find('[class*="st-key-again-"]'))

    def requested_hosts(self) -> set[str]:
        """Return the hosts of all requests since the last call."""
        urls = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                urls.append(message["params"]["request"]["url"])
        return {url.split("/")[2] for url in urls if url.startswith(("http", "ws"))}


def long_conversation(store: Store) -> Conversation:
    """Save a conversation whose next answers take long."""
    settings = {"max_tokens": -1, "temperature": 0.0}
    turns = [Turn("你好", [Answer("tiny", "你好。", 2, 0.1, "stop")])]
    found = Conversation(models=["tiny"], settings=settings, turns=turns)
    store.save(found)
    return found
