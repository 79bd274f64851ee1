"""Directories that all pytest-xdist workers of a test run share."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def shared_directory(
    factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], object]
) -> Path:
    """Return a new directory that `fill` has filled, once per test run; read-only afterwards.

    Other workers wait meanwhile. A failed `fill` is called again by the next test that needs it.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers
    folder, complete = root / f"shared-{name}", root / f"shared-{name}.complete"
    with FileLock(root / f"shared-{name}.lock"):
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            fill(folder)
            complete.touch()
    return folder
