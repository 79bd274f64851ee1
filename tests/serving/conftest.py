from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from openai import OpenAI

from minimind.serving.limits import Limits
from minimind.tokenizer import Tokenizer
from tests.support.services import InProcess, Process, save_models, serving


@pytest.fixture(scope="session")
def models_dir(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two runs, `tiny` and `other`."""
    return save_models(tmp_path_factory.mktemp("served"), tokenizer)


@pytest.fixture(scope="session")
def process(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A service of both models without an API key."""
    log = tmp_path_factory.mktemp("log") / "service.log"
    with serving(models_dir, log) as running:
        yield running


@pytest.fixture(scope="session")
def serve_here(models_dir: Path) -> Callable[..., InProcess]:
    """Return a factory of services for `tiny` with custom limits; entering one starts it."""

    def make(slots: int = 4, keys: Sequence[str] = (), **limits: float) -> InProcess:
        return InProcess(models_dir / "tiny", slots, Limits(**limits), keys)  # type: ignore[arg-type]

    return make


@pytest.fixture
def client(process: Process) -> Iterator[OpenAI]:
    """The official client of `process`."""
    with OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0) as client:
        yield client
