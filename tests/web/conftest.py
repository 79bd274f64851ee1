from collections.abc import Iterator
from pathlib import Path

import pytest

from minimind.tokenizer import Tokenizer
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
