"""The page in Chromium."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest

from minimind.web.store import Answer, Conversation, Store, Turn
from tests.support.chromium import needs_chromium, start_chromium
from tests.support.services import serving, wait_until

pytestmark = needs_chromium

INJECTIONS = [
    "<script>document.title='bad'</script>",
    "<img src=x onerror=document.title='bad'>",
    "<svg onload=document.title='bad'>",
    "<svg><script>document.title='bad'</script></svg>",
    "<iframe src=javascript:document.title='bad'></iframe>",
    "<body onload=document.title='bad'>",
    "<a href=javascript:document.title='bad'>a</a>",
    "<details open ontoggle=document.title='bad'>",
    "<style>*{display:none}</style>",
    "<link rel=stylesheet href=//bad.example/a.css>",
    "<meta http-equiv=refresh content=0;url=//bad.example>",
    "<base href=//bad.example/>",
    "<form action=//bad.example><input autofocus onfocus=document.title='bad'>",
    "<math><mtext><img src=x onerror=document.title='bad'></mtext></math>",
    "<!--><script>document.title='bad'</script>",
    "</div></body></html><script>document.title='bad'</script>",
    "\"><script>document.title='bad'</script>",
    "'-document.title='bad'-'",
    "javascript:document.title='bad'",
    "[a](javascript:document.title='bad')",
    "[a](data:text/html,<script>document.title='bad'</script>)",
    "![a](http://bad.example/a.png)",
    "![a](x\"onerror=\"document.title='bad')",
    "[a]: javascript:document.title='bad'",
    "<http://bad.example>",
    "&lt;script&gt;document.title='bad'&lt;/script&gt;",
    "$\\href{javascript:document.title='bad'}{a}$",
    ":material/home: :red[a] :smile:",
    "{{constructor.constructor('document.title=1')()}}",
    "%3Cscript%3Edocument.title='bad'%3C/script%3E",
]


@contextlib.contextmanager
def page_of(*flags: object, home: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run `minimind web` on a free port; yield the printed address and the process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        (home / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-m", "minimind", "web", *map(str, flags), "--port", str(port)],
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
        """Click a button by script, because it moves or is out of view."""
        self.driver.execute_script("arguments[0].click()", self.button(css))

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
            time.sleep(0.05)

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


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def url(models_dir: Path, home: Path) -> Iterator[str]:
    with page_of(models_dir, home=home) as (found, _):
        yield found


@pytest.fixture
def store(home: Path) -> Iterator[Store]:
    """The store of the page, deleted afterwards."""
    folder = home / "minimind" / "conversations"
    yield Store(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = Browser()
    yield found
    found.driver.quit()


def test_answers_survive_a_reload(url: str, browser: Browser, store: Store) -> None:
    browser.open(url)
    browser.ask("长江有多长？")
    browser.wait_until_finished()
    browser.wait(lambda: len(browser.messages()) == 2)
    question, answer = browser.messages()
    assert question == "长江有多长？"
    assert "tokens/s" in answer
    assert "other · " in answer  # the first model
    [kept] = saved_in(store)
    assert kept.turns[0].answers[0].text
    assert kept.turns[0].answers[0].tokens > 0
    address = browser.driver.current_url
    assert kept.id in address
    browser.driver.refresh()
    browser.wait(lambda: browser.messages() == [question, answer])
    browser.ask("然后呢？")
    browser.wait(lambda: len(browser.messages()) == 4)
    browser.wait_until_finished()
    assert browser.messages()[:2] == [question, answer]
    # A new conversation, and back.
    next(b for b in browser.find("button") if "New conversation" in b.text).click()
    browser.wait(lambda: not browser.messages())
    browser.button(f".st-key-open-{kept.id}").click()
    browser.wait(lambda: len(browser.messages()) == 4)


def saved_in(store: Store) -> list[Conversation]:
    found = [store.load(id) for id in store.ids()]
    return [conversation for conversation in found if conversation]


def long_conversation(store: Store) -> Conversation:
    """Save a conversation whose next answers take long."""
    settings = {"max_tokens": -1, "temperature": 0.0}
    turns = [Turn("你好", [Answer("tiny", "你好。", 2, 0.1, "stop")])]
    found = Conversation(models=["tiny"], settings=settings, turns=turns)
    store.save(found)
    return found


def test_a_streaming_answer_can_be_stopped(url: str, browser: Browser, store: Store) -> None:
    talk = long_conversation(store)
    browser.open(f"{url}&c={talk.id}")
    browser.wait(lambda: len(browser.messages()) == 2)
    browser.ask("说长一点")
    seen = set()

    def has_grown() -> bool:
        found = browser.messages()
        if len(found) == 4:
            seen.add(len(found[3]))
        return len(seen) >= 3

    browser.wait(has_grown)
    browser.button('[class*="st-key-stop-"]').click()
    browser.wait_until_finished()
    browser.wait(lambda: "stopped" in browser.messages()[-1])
    kept = store.load(talk.id)
    assert kept
    said = kept.turns[1].answers[0]
    assert said.finish_reason is None
    assert 0 < said.tokens < 8000  # the context has 8,192


def test_copy_writes_to_the_clipboard(url: str, browser: Browser, store: Store) -> None:
    texts = ["一 <b>x</b>\n\n- 二 [a](b)\n", "</script>\"'`${1}"]
    talk = Conversation(models=["tiny", "other"])
    talk.turns = [Turn("你好", [Answer("tiny", texts[0]), Answer("other", texts[1])])]
    store.save(talk)
    browser.driver.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]},
    )
    browser.open(f"{url}&c={talk.id}")
    for side, text in enumerate(texts):
        css = f".st-key-copy-{side}-{talk.turns[0].id}"
        button = browser.wait(lambda css=css: browser.shadow_buttons(css))[0]
        assert button.text.endswith(f"Copy {side + 1}")
        button.click()
        browser.wait(lambda button=button: button.text.startswith("check"))
        read = "navigator.clipboard.readText().then(arguments[0])"
        assert browser.driver.execute_async_script(read) == text


def test_other_buttons_are_disabled_while_an_answer_streams(
    url: str, browser: Browser, store: Store
) -> None:
    talk = long_conversation(store)
    talk.turns.append(Turn("说长一点", [Answer("tiny", "好。", 2, 0.1, "stop")]))
    store.save(talk)
    browser.open(f"{url}&c={talk.id}")
    # Editing an early question drops the later turns at once.
    browser.button(f".st-key-edit-{talk.turns[0].id}").click()
    [box] = browser.wait(lambda: browser.find('[data-testid="stForm"] textarea'))
    box.send_keys("！")
    next(b for b in browser.find('[data-testid="stForm"] button') if b.text == "Send").click()
    browser.wait(lambda: browser.find('[class*="st-key-stop-"] button'))
    assert (
        browser.num_enabled('[class*="st-key-again-"]')
        == browser.num_enabled('[class*="st-key-edit-"]')
        == 0
    )
    assert len([m for m in browser.find('[data-testid="stChatMessage"]') if m.is_displayed()]) == 2
    browser.press('[class*="st-key-stop-"]')
    browser.wait_until_finished()
    # A new question disables the buttons of earlier turns until it is answered.
    browser.wait(lambda: browser.num_enabled('[class*="st-key-edit-"]') == 1)
    browser.ask("再说")
    browser.wait(lambda: browser.find('[class*="st-key-stop-"] button'))
    browser.wait(lambda: len(browser.messages()) == 4)
    assert (
        browser.num_enabled('[class*="st-key-again-"]')
        == browser.num_enabled('[class*="st-key-edit-"]')
        == 0
    )
    browser.press('[class*="st-key-stop-"]')
    browser.wait(lambda: browser.num_enabled('[class*="st-key-edit-"]') == 2)
    assert browser.num_enabled('[class*="st-key-again-"]') == 1
    # Regenerate does so too.
    browser.press('[class*="st-key-again-"]')
    browser.wait(lambda: browser.find('[class*="st-key-stop-"] button'))
    assert (
        browser.num_enabled('[class*="st-key-again-"]')
        == browser.num_enabled('[class*="st-key-edit-"]')
        == 0
    )
    browser.press('[class*="st-key-stop-"]')
    browser.wait_until_finished()


def test_stop_and_closing_the_tab_cancel_generation_at_the_service(
    models_dir: Path, tmp_path: Path
) -> None:
    def running_and_waiting() -> list[int]:
        lines = httpx.get(f"{service.url}/metrics").text.splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return [int(float(found[f'minimind_{n}{{model="tiny"}}'])) for n in ("running", "waiting")]

    store = Store(tmp_path / "minimind" / "conversations")
    talks = [long_conversation(store) for _ in range(2)]
    first = Browser()
    with (
        serving(models_dir / "tiny", tmp_path / "service.log", "--slots", "1") as service,
        page_of("--url", service.url, home=tmp_path) as (url, _),
    ):
        driver = first.driver
        try:
            first.open(f"{url}&c={talks[0].id}")
            first.ask("说长一点")
            first.wait(lambda: running_and_waiting() == [1, 0])
            driver.switch_to.new_window("tab")
            first.open(f"{url}&c={talks[1].id}")
            first.ask("说长一点")
            first.wait(lambda: running_and_waiting() == [1, 1])  # queued
            first.press('[class*="st-key-stop-"]')
            first.wait(lambda: running_and_waiting() == [1, 0])
            first.wait_until_finished()
            driver.switch_to.window(driver.window_handles[0])
            driver.close()
            wait_until(lambda: running_and_waiting() == [0, 0])
        finally:
            driver.quit()
    said = store.load(talks[0].id)
    assert said
    assert said.turns[-1].answers[0].text  # the partial answer is saved


def test_an_invalid_conversation_is_reported_and_quarantined(
    url: str, browser: Browser, store: Store
) -> None:
    talk = long_conversation(store)
    path = store._folder / f"{talk.id}.json"
    path.write_text('{"turns": [{"question": 5}]}')
    browser.open(f"{url}&c={talk.id}")
    [alert] = browser.wait(lambda: browser.find('[data-testid="stAlert"]'))
    [quarantined] = store.quarantined()
    assert alert.text == f"A conversation could not be read. Its file was kept as: {quarantined}"
    assert quarantined.read_text() == '{"turns": [{"question": 5}]}'
    browser.ask("你好")
    browser.wait_until_finished()


def test_stored_settings_are_clamped(url: str, browser: Browser, store: Store) -> None:
    settings = {"temperature": 99, "top_p": -1.0, "top_k": 2.5, "max_tokens": 5, "seed": -3}
    talk = Conversation(models=["tiny"], settings=settings, turns=[Turn("你好", [])])
    store.save(talk)
    browser.open(f"{url}&c={talk.id}")
    browser.wait(lambda: len(browser.messages()) == 1)
    browser.button('[class*="st-key-again-"]').click()
    browser.wait(lambda: "5 tokens" in browser.messages()[-1])


def test_regenerate_and_edit(url: str, browser: Browser, store: Store) -> None:
    talk = Conversation(models=["tiny"], settings={"max_tokens": 12, "temperature": 1.5})
    talk.turns = [
        Turn("你好", [Answer("tiny", "旧的", 2)]),
        Turn("再见", [Answer("tiny", "旧的", 2)]),
    ]
    store.save(talk)
    browser.open(f"{url}&c={talk.id}")
    browser.button('[class*="st-key-again-"]').click()
    browser.wait(lambda: len(browser.messages()) == 4 and "旧的" not in browser.messages()[3])
    browser.wait_until_finished()
    assert "旧的" in browser.messages()[1]
    browser.button(f".st-key-edit-{talk.turns[0].id}").click()
    [box] = browser.wait(lambda: browser.find('[data-testid="stForm"] textarea'))
    box.send_keys("！早上好")
    next(b for b in browser.find('[data-testid="stForm"] button') if b.text == "Send").click()
    browser.wait(lambda: browser.messages()[:1] == ["你好！早上好"])
    # Later turns disappear only when the answer starts: until then the old buttons are visible.
    browser.wait(lambda: len(browser.messages()) == 2 and "tiny · " in browser.messages()[1])
    browser.wait_until_finished()
    kept = store.load(talk.id)
    assert kept
    assert [turn.question for turn in kept.turns] == ["你好！早上好"]  # later turns are dropped
    assert kept.turns[0].answers[0].text not in ("", "旧的")


def test_two_models_side_by_side(url: str, browser: Browser, store: Store) -> None:
    talk = Conversation(models=["tiny", "other"], settings={"max_tokens": 10})
    talk.turns = [Turn("你好", [Answer("tiny", "一"), Answer("other", "二")])]
    store.save(talk)
    browser.open(f"{url}&c={talk.id}")
    browser.wait(lambda: len(browser.messages()) == 3)
    browser.ask("长江呢？")
    browser.wait(lambda: len(browser.messages()) == 6)
    browser.wait_until_finished()
    browser.wait(lambda: "other · " in browser.messages()[-1])
    assert "tiny · " in browser.messages()[-2]
    first, second = browser.find('[data-testid="stChatMessage"]')[-2:]
    assert first.location["y"] == second.location["y"]
    assert first.location["x"] + first.size["width"] <= second.location["x"]


def test_injections_are_shown_as_text(url: str, browser: Browser, store: Store) -> None:
    assert len(INJECTIONS) == 30
    talk = Conversation(models=["tiny"], system=INJECTIONS[0], settings={"max_tokens": 2})
    talk.turns = [Turn(text, [Answer(text, text, error=text)]) for text in INJECTIONS]
    store.save(talk)
    for text in INJECTIONS:  # titles in the sidebar
        store.save(Conversation(turns=[Turn(text)]))
    browser.open(f"{url}&c={talk.id}")
    browser.wait(lambda: len(browser.messages()) == 60)
    browser.requested_hosts()
    shown = browser.messages()
    for place, text in enumerate(INJECTIONS):
        assert shown[2 * place] == text
        assert shown[2 * place + 1].count(text) >= 1
    browser.press(".st-key-more")
    browser.wait(lambda: len(browser.find('[class*="st-key-open-"] button')) == 31)
    titles = {b.text for b in browser.find('[class*="st-key-open-"] button')}
    assert titles == {Conversation(turns=[Turn(text)]).title for text in INJECTIONS}
    # The same inside formatted text.
    talk.turns = [
        Turn("x", [Answer("tiny", f"**a** `b {text}`\n\n{text}\n\n- c {text}")])
        for text in INJECTIONS
    ]
    talk.turns.append(Turn("x", [Answer("tiny", "```\n" + "\n".join(INJECTIONS) + "\n```")]))
    store.save(talk)
    browser.driver.refresh()
    browser.wait(lambda: len(browser.messages()) == 62 and browser.find("code"))
    shown = browser.messages()
    for place, text in enumerate(INJECTIONS):  # completely visible
        assert shown[2 * place + 1].count(text) == 3, text
    assert browser.driver.title == "MiniMind"
    inside = '[data-testid="stChatMessageContent"]'
    for what in ("script", "img", "iframe", "a[href]", "style", "link", "form:not(.x)", "base"):
        assert not browser.find(f"{inside} {what}"), what
    host = url.split("/")[2]
    assert browser.requested_hosts() <= {host}
    # Typed text is rendered like stored text.
    browser.ask(INJECTIONS[1])
    browser.wait(lambda: INJECTIONS[1] in browser.messages())
    assert browser.driver.title == "MiniMind"


CODE = r"""**Code** in `x[0] < y`, `C:\Users\me`, `a  b` and `![i](u)`:

1. first

   ```python
   if x[0] < y:
       print("$x$ **a**\n")
   ```
2. second

Prose.

    indented[0] = "\t"
      deeper

```

def f(*a: int) -> None: ...
```
"""
RENDERED_CODE = [
    "x[0] < y", r"C:\Users\me", "a  b", "![i](u)",
    'if x[0] < y:\n    print("$x$ **a**\\n")',
    'indented[0] = "\\t"\n  deeper',
    "\ndef f(*a: int) -> None: ...",
]  # fmt: skip


def test_code_is_rendered_verbatim(url: str, browser: Browser, store: Store) -> None:
    talk = Conversation(turns=[Turn("?", [Answer("tiny", CODE)])])
    store.save(talk)
    browser.open(f"{url}&c={talk.id}")
    script = (
        "return [...document.querySelectorAll('[data-testid=stChatMessageContent] code')]"
        ".map(e => e.innerText)"
    )

    def rendered_code() -> list[str]:
        return [text.removesuffix("\n") for text in browser.driver.execute_script(script)]

    browser.wait(lambda: len(rendered_code()) == len(RENDERED_CODE))
    assert rendered_code() == RENDERED_CODE
    assert {e.text for e in browser.find(".answer strong")} == {"Code"}
    assert browser.find(".answer li pre")


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


def test_conversations_are_listed_in_pages(url: str, browser: Browser, store: Store) -> None:
    talks = [Conversation(turns=[Turn(f"第{number}个")]) for number in range(45)]
    for talk in talks:
        store.save(talk)

    def titles() -> list[str]:
        return [b.text for b in browser.find('[class*="st-key-open-"] button')]

    newest = [talk.title for talk in reversed(talks)]
    browser.open(url)
    browser.wait(lambda: titles() == newest[:20])
    browser.press(".st-key-more")
    browser.wait(lambda: titles() == newest[:40])
    browser.press(".st-key-more")
    browser.wait(lambda: titles() == newest)
    assert not browser.find(".st-key-more")
    browser.press(f".st-key-open-{talks[0].id}")
    browser.wait(lambda: browser.messages() == ["第0个"])


def test_chinese_page_on_a_phone(url: str, store: Store) -> None:
    talk = Conversation(models=["tiny"], settings={"max_tokens": 5})
    words = ["长" * 300, "a" * 300]
    talk.turns = [Turn(word, [Answer("tiny", word), Answer("other", word)]) for word in words]
    store.save(talk)
    phone = Browser("zh-CN", width=390)
    try:
        phone.open(f"{url}&c={talk.id}")
        phone.wait(lambda: len(phone.messages()) == 6)
        [box] = phone.find('[data-testid="stChatInputTextArea"]')
        assert box.get_attribute("placeholder") == "输入消息"
        assert "重新生成" in phone.driver.page_source
        wide = "return document.documentElement.scrollWidth"
        assert phone.driver.execute_script(wide) <= 390  # no horizontal overflow
        for message in phone.find('[data-testid="stChatMessage"]'):
            assert message.size["width"] <= 390
    finally:
        phone.driver.quit()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_service_ends_with_the_page(models_dir: Path, tmp_path: Path, number: int) -> None:
    with page_of(models_dir, home=tmp_path) as (_, process):
        page = psutil.Process(process.pid)
        end = time.monotonic() + 60
        while not (children := page.children(recursive=True)) and time.monotonic() < end:
            time.sleep(0.05)
        assert children
        time.sleep(1)
        process.send_signal(number)
        process.wait(timeout=20)
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive


def test_usage_errors(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    request.addfinalizer(taken.close)
    port = taken.getsockname()[1]
    for flags, message in [
        (["--url", "http://127.0.0.1:9", "--port", str(port)], f"port {port}: Address already"),
        ([], "give a MODEL, or a service with --url URL"),
        (["a", "--url", "http://b"], "give a MODEL, or a service with --url URL"),
        (["--url", "ftp://b"], "is not the URL of a service"),
        ([str(tmp_path / "none")], "there is no such directory"),
    ]:
        done = subprocess.run(
            [sys.executable, "-m", "minimind", "web", *flags],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"XDG_DATA_HOME": str(tmp_path)},
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert message in done.stderr
        assert "Traceback" not in done.stderr
