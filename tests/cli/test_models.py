"""Names of models on the command line: an existing path always wins over syntax in its name."""

from pathlib import Path

import pytest

from minimind.cli.models import _split, is_service


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("base", "lora", "c++", "a+b", "x+y+z", "http:/odd"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("place", "directory", "adapter"),
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
def test_a_plus_sign_in_a_path_is_part_of_it(
    place: str, directory: str, adapter: str | None
) -> None:
    assert _split(place) == (Path(directory), adapter and Path(adapter))


def test_a_path_that_looks_like_a_url_is_a_path() -> None:
    assert is_service("http://127.0.0.1:8000")
    assert not is_service("http://odd")
    assert not is_service("base")
