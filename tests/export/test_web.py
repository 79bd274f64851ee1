"""The exported page: its folder, the download of wllama, and the page in Chromium.

The tests in Chromium are slow and need wllama's npm package: from the cache folder or a network.
"""

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind.errors import ResourceError, UsageError
from minimind.export import web
from minimind.export.web import export_web
from minimind.model import Transformer, save_model
from minimind.tokenizer import Tokenizer, encode_chat
from minimind.tokenizer.chat import Message
from tests.support.chromium import needs_chromium, start_chromium
from tests.support.small_models import save_small_model, small_model

_PATH = "/models/small/"  # of the page on its host
_SYSTEM = "你是一个乐于助人的助手。"
_QUESTIONS = ("泰山在哪里？", "Why is the sea salty?")
_TOKENS = 12  # per answer


class Host:
    """A static web host with the folder of a page at `_PATH`; every request is recorded."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.requests: list[tuple[str, int]] = []  # path and status
        host = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def translate_path(self, path: str) -> str:
                inside = path.partition("?")[0].removeprefix(_PATH)
                return str(folder / inside) if path.startswith(_PATH) else str(folder / "none")

            def log_request(self, code: Any = "-", size: Any = "-") -> None:
                host.requests.append((self.path, int(code)))

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}
        )
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}{_PATH}"

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class Page:
    """The exported page in a browser."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        driver.get(url)
        self.wait(lambda: self["send"].is_enabled())

    def __getitem__(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def texts(self, css: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return self.driver.execute_script(script, css)  # type: ignore[no-any-return]

    def wait(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < end, self["status"].text
            time.sleep(0.02)

    def set(self, **values: object) -> None:
        for name, value in values.items():
            script = "document.getElementById(arguments[0]).value = arguments[1]"
            self.driver.execute_script(script, name.replace("_", "-"), value)

    def ask(self, question: str) -> str:
        number = len(self.texts(".note"))
        self["input"].send_keys(question)
        self["send"].click()
        self.wait(lambda: len(self.texts(".note")) > number)
        return self.texts(".assistant")[-1]


@pytest.fixture(scope="module")
def exported(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Transformer, Path]:
    """A model with a context of 1,024 tokens, and its page at F16."""
    folder = tmp_path_factory.mktemp("web")
    model = small_model("llama", tokenizer.vocab_size, max_position_embeddings=1024)
    with torch.no_grad():
        # Only tokens that are text by themselves: both programs show the rest in their own way.
        for token, content in enumerate(tokenizer.text_bytes_of):
            if not content or content.decode("utf-8", "ignore").encode() != content:
                model.model.embed_tokens.weight[token] = 0.0
    save_model(folder / "model", model, tokenizer)
    export_web(folder / "model", folder / "page", name="小模型", type="f16")
    return model, folder / "page"


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    driver = start_chromium()
    yield driver
    driver.quit()


@pytest.fixture
def host(exported: tuple[Transformer, Path]) -> Iterator[Host]:
    host = Host(exported[1])
    yield host
    with contextlib.suppress(OSError):
        host.stop()


def answers_of_transformers(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """Return greedy answers to a system message and `_QUESTIONS`, in one conversation."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    messages: list[Message] = [{"role": "system", "content": _SYSTEM}]
    answers = []
    for question in _QUESTIONS:
        messages.append({"role": "user", "content": question})
        prompt = torch.tensor([encode_chat(tokenizer, messages, add_generation_prompt=True)[0]])
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=_TOKENS,
            eos_token_id=list(tokenizer.stop_ids),
            pad_token_id=tokenizer.end_of_text,
        )[0, prompt.shape[1] :]
        answers.append(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


@needs_chromium
@pytest.mark.slow
def test_answers_equal_those_of_transformers(
    exported: tuple[Transformer, Path], driver: Any, host: Host, tokenizer: Tokenizer
) -> None:
    """Greedy, with a system message, over two turns; and again without the host."""
    page = Page(driver, host.url)
    expected = answers_of_transformers(exported[1].parent / "model", tokenizer)
    assert all(expected)
    page.set(system=_SYSTEM, temperature=0, max_tokens=_TOKENS)
    assert [page.ask(question) for question in _QUESTIONS] == expected
    assert page.texts(".user") == list(_QUESTIONS)
    assert all(f"{_TOKENS} tokens · " in note for note in page.texts(".note"))
    assert all("tokens/s · length limit reached" in note for note in page.texts(".note"))
    host.stop()
    page = Page(driver, host.url)
    page.set(system=_SYSTEM, temperature=0, max_tokens=_TOKENS)
    assert [page.ask(question) for question in _QUESTIONS] == expected


@needs_chromium
@pytest.mark.slow
def test_a_browser_without_new_webassembly_features(
    exported: tuple[Transformer, Path], host: Host, tokenizer: Tokenizer
) -> None:
    """Such as Safari: wllama's other build is used, from the page's own folder."""
    expected = answers_of_transformers(exported[1].parent / "model", tokenizer)
    driver = start_chromium()
    try:
        script = {"source": "delete WebAssembly.Suspending; delete WebAssembly.promising"}
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", script)
        page = Page(driver, host.url)
        page.set(system=_SYSTEM, temperature=0, max_tokens=_TOKENS)
        assert [page.ask(question) for question in _QUESTIONS] == expected
    finally:
        driver.quit()
    names = {path.rpartition("/")[2] for path, _ in host.requests}
    assert {"compat.js", "compat.wasm"} <= names and "wllama.wasm" not in names


@needs_chromium
@pytest.mark.slow
def test_a_browser_that_blocks_storage(host: Host) -> None:
    driver = start_chromium(blocks_storage=True)
    try:
        page = Page(driver, host.url)
        script = "const done = arguments[0]; caches.open('x').then(() => done(1), () => done(0))"
        assert driver.execute_async_script(script) == 0, "storage is not blocked"
        assert page["status"].text.startswith("f16 · ")
        assert page.ask("1")
    finally:
        driver.quit()


@needs_chromium
@pytest.mark.slow
def test_the_page_uses_only_its_own_folder(driver: Any, host: Host) -> None:
    driver.get_log("performance")
    Page(driver, host.url).ask("1")
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    assert f"{host.url}page.json" in urls
    assert all(url.startswith((host.url, f"blob:{host.url[:-1]}"[:20], "data:")) for url in urls)
    assert {status for _, status in host.requests} <= {200, 304}
    assert Page(driver, host.url)["licence"].get_property("href").endswith("/LICENCE.txt")
    assert all(path.startswith(_PATH) for path, _ in host.requests)
    # Nor can it, should a model's answer or a later change try to.
    other = Host(Path("."))
    script = "const done = arguments[1]; fetch(arguments[0]).then(() => done(1), () => done(0))"
    assert driver.execute_async_script(script, other.url) == 0
    other.stop()
    assert other.requests == []


@needs_chromium
@pytest.mark.slow
def test_stop_new_chat_and_a_full_context(driver: Any, host: Host) -> None:
    page = Page(driver, host.url)
    page.set(max_tokens=1000, seed=1)
    page["input"].send_keys(_QUESTIONS[0])
    page["send"].click()
    page.wait(lambda: any(page.texts(".assistant")))
    driver.execute_script("document.getElementById('stop').click()")
    page.wait(lambda: page.texts(".note"))
    [note] = page.texts(".note")
    assert note.endswith("tokens/s · stopped") and int(note.split()[0]) < 1000
    page.set(max_tokens=8)
    page.ask("a " * 700)
    page.ask("b " * 700)
    assert page.texts(".note")[-1].endswith("context full: left out the 4 oldest messages")
    page["input"].send_keys("c " * 2000)
    page["send"].click()
    page.wait(lambda: "longer than the model's context" in page["status"].text)
    assert page["input"].get_property("value").startswith("c c c")
    # The same while the next message is being typed: that one stays in the field.
    count = len(page.texts(".message"))
    script = "document.getElementById('send').click(); document.getElementById('input').value = '1'"
    driver.execute_script(script)
    page.wait(lambda: len(page.texts(".message")) == count and page["send"].is_displayed())
    assert page["input"].get_property("value") == "1"
    page["send"].click()
    page.wait(lambda: len(page.texts(".message")) == count + 2 and page.texts(".message")[-1])
    page["new-chat"].click()
    assert page.texts(".message") == page.texts(".note") == []
    page.set(input="")
    page.ask("1")
    assert page["status"].text.startswith("f16 · ")


@needs_chromium
@pytest.mark.slow
def test_languages_settings_and_a_phone(driver: Any, host: Host) -> None:
    page = Page(driver, host.url)
    assert driver.title == page["name"].text == "小模型"
    assert page["status"].text.startswith("f16 · 0.") and page["send"].text == "Send"
    page["language"].click()
    assert (page["send"].text, page["language"].text) == ("发送", "English")
    assert driver.execute_script("return document.documentElement.lang") == "zh-CN"
    assert not page["temperature"].is_displayed()
    page["open-settings"].click()
    assert page["temperature"].is_displayed()
    size = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        script = "return [document.documentElement.scrollWidth, document.body.scrollHeight]"
        width, height = driver.execute_script(script)
        assert width <= 360 and height <= 740
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_chromium
@pytest.mark.slow
def test_an_earlier_page_is_replaced(
    tokenizer: Tokenizer, exported: tuple[Transformer, Path], tmp_path: Path
) -> None:
    out = tmp_path / "page"
    out.mkdir()
    export_web(exported[1].parent / "model", out, name="a", type="q8_0")
    (out / "CNAME").write_text("example.com")
    before = {path.name for path in out.iterdir()}
    report = export_web(exported[1].parent / "model", out, name="b", type="q4_0")
    after = {path.name for path in out.iterdir()}
    settings = json.loads((out / "page.json").read_text("utf-8"))
    assert settings["name"] == "b" and settings["size"] == report.size
    assert (out / settings["model"]).stat().st_size == report.size
    assert [len(after & before), len(before - after), len(after - before)] == [7, 1, 1]
    licences = [path.read_text() for path in out.glob("wllama-*/LICENCE*")]
    assert all("MIT License" in licence for licence in licences)
    assert len(set(licences)) == 2 and not list(tmp_path.glob(".*"))


class _Registry(http.server.BaseHTTPRequestHandler):
    """An npm registry whose package is another file."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"another file")

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_download_of_another_file_or_none(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_small_model(tmp_path / "model", "llama", tokenizer)
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    with http.server.HTTPServer(("127.0.0.1", 0), _Registry) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"{url}/")
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(ResourceError, match=f"{url}/@wllama.*is not the published file"):
            export_web(tmp_path / "model", tmp_path / "page", name="a")
        thread.join()
    with pytest.raises(ResourceError, match=r"cannot be downloaded: .*--wllama wllama-.*\.tgz"):
        export_web(tmp_path / "model", tmp_path / "page", name="a")
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "no url")
    with pytest.raises(ResourceError, match="cannot be downloaded"):
        export_web(tmp_path / "model", tmp_path / "page", name="a")
    with pytest.raises(UsageError, match="is not wllama"):
        export_web(
            tmp_path / "model",
            tmp_path / "page",
            name="a",
            wllama=[tmp_path / "model" / "config.json"],
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_folder_with_other_files_stays(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_small_model(tmp_path / "model", "llama", tokenizer)
    for out in (tmp_path / "model", tmp_path / "model" / "config.json"):
        with pytest.raises(UsageError, match="already exists and holds no exported page"):
            export_web(tmp_path / "model", out, name="a")
    assert not web.holds_page(tmp_path / "model")
