import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# small_runs.py is a module because golden figures are written, and children run, without pytest.
sys.path.insert(0, str(Path(__file__).parent))

from small_runs import Lives
from stages import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text.jsonl (400 short texts), chat.jsonl and pairs.jsonl (200 each)."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    """Starts processes that may be killed; driver.py has what they can do."""
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    with contextlib.closing(Lives(tmp_path_factory.mktemp("lives") / "output")) as lives:
        yield lives
