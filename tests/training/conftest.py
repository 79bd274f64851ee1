import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minimind.config.settings import Recipe
from tests.support.checkpoints import save
from tests.support.small_runs import ForkServer, nano_recipe
from tests.support.stages import MakeRecipe, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.jsonl (400 short texts), chat.jsonl and pairs.jsonl (200 each)."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only run with small checkpoints of steps 7 and 14."""
    run = tmp_path_factory.mktemp("saved")
    save(run, 7)
    save(run, 14)
    return run


@pytest.fixture
def recipe(run: Path, corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> MakeRecipe:
    """Return a function that makes recipes of five steps in `run`."""

    def make(objective: str = "pretrain", out: Path = run, **settings: Any) -> Recipe:
        names = {"pretrain": "text.jsonl", "sft": "chat.jsonl", "dpo": "pairs.jsonl"}
        defaults = {
            "data__sources": [str(corpus / names[objective])],
            "data__store": str(tmp_path / "stores"),
            "data__validation_fraction": 0.1,
            "tokenizer": str(tokenizer_dir) if objective == "pretrain" else None,
            "training__steps": 5,
        }
        return nano_recipe(objective, out, **defaults | settings)

    return make


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Start processes that may be killed; driver.py defines what they do."""
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    with contextlib.closing(
        ForkServer(tmp_path_factory.mktemp("fork-server") / "output")
    ) as fork_server:
        yield fork_server


@pytest.fixture
def ordered_event_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Number TensorBoard's files from 0: within one second it reads .10 before .9."""
    from tensorboard.summary.writer import event_file_writer

    counter = event_file_writer.AtomicCounter(0)
    monkeypatch.setattr(event_file_writer, "_global_uid", counter)
