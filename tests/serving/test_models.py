from pathlib import Path

import pytest

from minimind.serving.models import find_models


@pytest.mark.parametrize(
    ("made", "given", "name"),
    [
        (["a/model/config.json"], "a", "a"),  # a run, by its having a model
        (["a/model/config.json"], "a/model", "model"),
        (["a/model/config.json", "a/recipe.toml"], "a/model", "a"),
        (["a/model/config.json", "a/checkpoints/1"], "a/model", "a"),
        (["a/config.json", "recipe.toml"], "a", "a"),
    ],
)
def test_names(tmp_path: Path, made: list[str], given: str, name: str) -> None:
    for path in made:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert list(find_models([tmp_path / given])) == [name]
