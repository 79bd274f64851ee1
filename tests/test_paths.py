import os
import sys
from pathlib import Path

import pytest

from minimind.errors import UsageError
from minimind.paths import cache_folder, data_folder, expand_user

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="paths of Linux")


def test_environment_variables_set_the_folders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("MINIMIND_CACHE", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "minimind"
    assert data_folder() == tmp_path / ".local" / "share" / "minimind"
    assert expand_user("~/a") == tmp_path / "a"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "d"))
    assert cache_folder() == tmp_path / "c" / "minimind"
    assert data_folder() == tmp_path / "d" / "minimind"
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.setenv("MINIMIND_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"


def test_a_missing_home_names_the_variable_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", missing)
    for name in ("HOME", "MINIMIND_CACHE", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="variable MINIMIND_CACHE to a folder"):
        cache_folder()
    with pytest.raises(UsageError, match="variable XDG_DATA_HOME to a folder"):
        data_folder()
    with pytest.raises(UsageError, match="~/a: the home directory for ~ is unknown"):
        expand_user("~/a")
    assert expand_user("a/~") == Path("a/~")
    monkeypatch.setenv("MINIMIND_CACHE", "cache")
    assert cache_folder() == Path("cache")
    assert os.environ.get("HOME") is None
