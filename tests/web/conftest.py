import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from minimind.tokenizer import Tokenizer
from minimind.web.store import Store
from tests.support.browser import Browser, page_of
from tests.support.chromium import HAS_CHROMIUM, NO_CHROMIUM
from tests.support.services import Process, save_models, serving


@pytest.fixture(scope="session")
def models_dir(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two runs, `tiny` and `other`, with a context for long answers."""
    return save_models(tmp_path_factory.mktemp("served"), tokenizer, context=8192)


@pytest.fixture(scope="session")
def process(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A service of both models with the API key `secret`."""
    log = tmp_path_factory.mktemp("log") / "service.log"
    with serving(models_dir, log, MINIMIND_API_KEY="secret") as running:
        yield running


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def url(models_dir: Path, home: Path) -> Iterator[str]:
    """The address of a page for both models."""
    if not HAS_CHROMIUM:
        pytest.skip(NO_CHROMIUM)
    with page_of(models_dir, home=home) as (found, _):
        yield found


@pytest.fixture
def store(home: Path) -> Iterator[Store]:
    """The store of the page, deleted afterwards."""
    folder = home / "minimind" / "conversations"
    yield Store(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if not HAS_CHROMIUM:
        pytest.skip(NO_CHROMIUM)
    found = Browser()
    yield found
    found.driver.quit()
