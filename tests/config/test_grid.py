from pathlib import Path

import pytest

from minimind.config import variants
from minimind.config.grid import split_values
from minimind.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("4", ["4"]),
        ("4,8, 16", ["4", "8", "16"]),
        ('["a", "b"]', ['["a", "b"]']),
        ('["a,b"],["c"]', ['["a,b"]', '["c"]']),
        ('"a,b"', ['"a,b"']),
        ("'a,b','c\"'", ["'a,b'", "'c\"'"]),
        (r'"a\",b",c', [r'"a\",b"', "c"]),
        ("{a = [1, 2], b = 3},{a = []}", ["{a = [1, 2], b = 3}", "{a = []}"]),
        ("it's,ok", ["it's", "ok"]),
        ("北京,上海", ["北京", "上海"]),
    ],
)
def test_values_are_split_at_commas_outside_of_brackets_and_quotes(
    text: str, values: list[str]
) -> None:
    assert split_values(text) == values


def test_combinations_vary_the_last_setting_fastest() -> None:
    result = variants(["model.num_hidden_layers=2,4", "training.steps=9", "optim.lr=1e-3,2e-3"])
    assert [variant.overrides for variant in result] == [
        ["model.num_hidden_layers=2", "training.steps=9", "optim.lr=1e-3"],
        ["model.num_hidden_layers=2", "training.steps=9", "optim.lr=2e-3"],
        ["model.num_hidden_layers=4", "training.steps=9", "optim.lr=1e-3"],
        ["model.num_hidden_layers=4", "training.steps=9", "optim.lr=2e-3"],
    ]
    assert result[1].settings == {"model.num_hidden_layers": 2, "optim.lr": 2e-3}
    assert result[1].name == "num_hidden_layers-2-lr-0.002"


def test_single_values_give_one_variant() -> None:
    [variant] = variants(["optim.lr=1e-3"])
    assert (variant.name, variant.settings, variant.overrides) == ("variant", {}, ["optim.lr=1e-3"])
    assert len(variants([])) == 1


def test_names_contain_only_the_settings_that_distinguish_variants() -> None:
    tables = (
        "{num_hidden_layers = 2, hidden_size = 64, head_dim = 16},"
        "{num_hidden_layers = 8, hidden_size = 32, head_dim = 16}"
    )
    first, second = variants([f"model={tables}"])
    assert (first.name, second.name) == ("num_hidden_layers-2", "num_hidden_layers-8")
    assert second.settings == {"model.num_hidden_layers": 8, "model.hidden_size": 32}


def test_names_are_distinct_and_usable_as_directory_names() -> None:
    result = variants(['data.sources=["a/b.jsonl"],["a:b.jsonl"]', "model.init=../x y,/x/y"])
    names = [variant.name for variant in result]
    assert len(set(names)) == 4
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") for name in names)
    same_last = variants(["validation.every=1,2", "checkpoint.every=3,4"])
    assert same_last[0].name == "validation.every-1-checkpoint.every-3"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lr=1,"], "a value is missing before or after a comma"),
        (["optim.lr=1,1"], "the same value is given twice"),
        (["optim.lr=1", "optim.lr=2"], "optim.lr is given twice"),
    ],
)
def test_invalid_values_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        variants(overrides)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ("x,x!,x-1", ["init-x-2", "init-x-3", "init-x-1"]),
        ("x,x!,x?", ["init-x-1", "init-x-2", "init-x-3"]),
        ("x,x!,x-2,x-3", ["init-x-1", "init-x-4", "init-x-2", "init-x-3"]),
        ("Tea,tea", ["init-Tea-1", "init-tea-2"]),
    ],
)
def test_variants_have_distinct_directories(values: str, names: list[str]) -> None:
    result = [variant.name for variant in variants([f"model.init={values}"])]
    assert result == names
    assert len({name.casefold() for name in result}) == len(result)


def test_a_path_that_exists_is_one_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out/a,b").mkdir(parents=True)
    [variant] = variants(["model.init=out/a,b"])
    assert variant.overrides == ["model.init=out/a,b"]
    assert [variant.overrides for variant in variants(["model.init=out/a,c"])] == [
        ["model.init=out/a"],
        ["model.init=c"],
    ]
