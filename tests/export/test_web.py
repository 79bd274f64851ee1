"""The exported page in Chromium, with wllama as npm publishes it (`make slow`; needs a network)."""

import functools
import http.server
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minimind.export.web import export_web
from minimind.inference.generate import answer_all
from minimind.model import load_model
from minimind.tokenizer import Tokenizer
from tests.support.small_models import save_small_model

pytestmark = pytest.mark.slow
_CHROMIUM, _DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_QUESTION = "泰山在哪里？"


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def site(tokenizer: Tokenizer, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(address, model directory) of an exported page on a static host."""
    save_small_model(tmp_path / "model", "llama", tokenizer)
    export_web(tmp_path / "model", tmp_path / "page", name="small", type="f16")
    handler = functools.partial(_Quiet, directory=tmp_path / "page")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", tmp_path / "model"
        server.shutdown()
        thread.join()


@pytest.mark.skipif(not _CHROMIUM or not _DRIVER, reason="needs chromium and chromedriver")
def test_the_page_answers_as_the_engine_does(
    site: tuple[str, Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Greedy, in both languages, with no request to another host."""
    from selenium import webdriver
    from selenium.webdriver.common.by import By

    address, directory = site
    options = webdriver.ChromeOptions()
    options.binary_location = _CHROMIUM or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(_DRIVER))

    def element(name: str) -> Any:
        return driver.find_element(By.ID, name)

    def wait(condition: Any) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, element("status").text
            time.sleep(0.1)

    try:
        driver.get(address)
        wait(lambda: element("send").is_enabled())
        texts = {element("language").text: element("clear").text}
        element("language").click()
        texts[element("language").text] = element("clear").text
        assert texts == {"中文": "Clear", "English": "清空对话"}
        driver.execute_script(
            "document.getElementById('temperature').value = 0;"
            "document.getElementById('max-tokens').value = 24;"
        )
        element("input").send_keys(_QUESTION)
        element("send").click()
        wait(lambda: driver.find_elements(By.CSS_SELECTOR, ".rate"))
        answer = driver.find_element(By.CSS_SELECTOR, ".assistant").get_property("textContent")
        requests = driver.execute_script(
            "return performance.getEntriesByType('resource').map(entry => entry.name)"
        )
    finally:
        driver.quit()
    assert all(url.startswith((address, "blob:")) for url in requests), requests
    model = load_model(directory).eval()
    [expected] = answer_all(model, tokenizer, [_QUESTION], max_new_tokens=24, temperature=0)
    assert answer.strip() == expected.strip() and expected.strip()
