"""Model names on the command line: an existing path takes precedence over DIR+ADAPTER and URLs."""

from pathlib import Path

import pytest

from minimind.cli.models import _split_adapter, is_service


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("base", "lora", "c++", "a+b", "x+y+z", "http:/odd"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("spec", "directory", "adapter"),
    [
        ("base", "base", None),
        ("base+lora", "base", "lora"),
        ("base+none", "base", "none"),
        ("a+b", "a+b", None),
        ("a+b+lora", "a+b", "lora"),
        ("base+a+b", "base", "a+b"),
        ("x+y+z+a+b", "x+y+z", "a+b"),
        ("c++", "c++", None),
        ("c+++lora", "c++", "lora"),
        ("none+lora", "none+lora", None),
        ("+lora", "+lora", None),
    ],
)
def test_adapter_is_split_at_a_plus_sign_outside_of_paths(
    spec: str, directory: str, adapter: str | None
) -> None:
    assert _split_adapter(spec) == (Path(directory), adapter and Path(adapter))


def test_an_existing_path_is_not_a_url() -> None:
    assert is_service("http://127.0.0.1:8000")
    assert not is_service("http://odd")
    assert not is_service("base")
