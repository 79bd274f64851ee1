"""Fixtures: a tiny random model and a small benchmark."""

from pathlib import Path

import pytest

from minimind.evaluation.models import LocalModel
from minimind.model import Transformer, save_model
from minimind.tokenizer import Tokenizer
from tests.support.small_benchmarks import make_ceval, make_varied


@pytest.fixture(scope="session")
def varied(tokenizer: Tokenizer) -> Transformer:
    return make_varied(tokenizer)


@pytest.fixture(scope="session")
def varied_dir(
    varied: Transformer, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run directory of `varied`; read-only."""
    run = tmp_path_factory.mktemp("varied") / "tiny"
    save_model(run / "model", varied, tokenizer)
    return run


@pytest.fixture
def local(varied_dir: Path) -> LocalModel:
    return LocalModel(varied_dir, "cpu")


@pytest.fixture(scope="session")
def ceval_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that contains `ceval-exam`, as unpacked from its archive."""
    folder = tmp_path_factory.mktemp("benchmarks")
    make_ceval(folder / "ceval-exam")
    return folder
