"""The hand-written reference pages, compared with the code and with real runs."""

import ast
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import minimind
from docs.reference import DOCS

LANGUAGES = ("en", "zh")
_ROW = re.compile(r"^\| `([^`]+)` \|(?!.*---)", re.M)
# Keys that a short CPU run of dense models on local data does not write.
_CONDITIONAL = {
    *("samples", "loss_scale", "from_steps", "to_steps", "active_parameters"),
    *("balance_loss", "expert_load/E", "expert_load/max", "expert_load/min"),
    *("router_entropy", "dropped_tokens", "datasets"),
}


def documented_keys(lang: str) -> dict[str, set[str]]:
    """Return the keys in the tables of the metrics page by section."""
    text = (DOCS / lang / "reference" / "metrics.md").read_text("utf-8")
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    return {section.partition("\n")[0]: set(_ROW.findall(section)) for section in sections}


def written_metrics(demo: Path) -> tuple[set[str], set[str], set[str]]:
    """Return the kinds and keys of all metrics.jsonl files, and the keys of all summaries."""
    lines = [
        json.loads(line)
        for file in demo.glob("*/metrics.jsonl")
        for line in file.read_text("utf-8").splitlines()
    ]
    summaries = [json.loads(file.read_text("utf-8")) for file in demo.glob("*/summary.json")]
    return (
        {line["kind"] for line in lines},
        {key for line in lines for key in line},
        {key for summary in summaries for key in summary},
    )


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_metric_is_documented(lang: str, small_demo: tuple[Path, str]) -> None:
    kinds, keys, summary_keys = written_metrics(small_demo[0] / "out" / "demo")
    sections = list(documented_keys(lang).values())
    assert kinds <= sections[0]
    of_lines = set().union(*sections[1:-1])
    assert keys <= of_lines
    assert of_lines - keys <= _CONDITIONAL
    validation = sections[2] | sections[3]
    of_summary = sections[-1] | validation | {f"first_{key}" for key in validation}
    assert summary_keys <= of_summary
    assert sections[-1] - summary_keys <= _CONDITIONAL


def test_both_languages_document_the_same_metrics() -> None:
    english, chinese = (list(documented_keys(lang).values()) for lang in LANGUAGES)
    assert english == chinese


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_run_directory_page_names_every_file(lang: str, small_demo: tuple[Path, str]) -> None:
    page = (DOCS / lang / "reference" / "run-directory.md").read_text("utf-8")
    demo = small_demo[0] / "out" / "demo"
    for run in ("pretrain", "dpo", "identity"):
        for path in (demo / run).iterdir():
            assert path.name in page, path
        for path in next((demo / run / "checkpoints").iterdir()).iterdir():
            assert path.name in page, path
    for path in demo.iterdir():
        is_run = (path / "recipe.toml").is_file()
        assert is_run or path.name in page or path.name == "time.json", path


def documented_calls(lang: str) -> dict[str, ast.Call]:
    """Return the signatures of the Python page: `minimind.load(path, *, device="auto")`, …"""
    page = (DOCS / lang / "reference" / "python.md").read_text("utf-8")
    lines = re.findall(r"^((?:minimind|model|tokenizer)\.\w+)(\(.*\))$", page, re.M)
    return {
        name: ast.parse(f"def f{arguments}: ...").body[0].args  # type: ignore[attr-defined]
        for name, arguments in lines
    }


def parameters(arguments: Any) -> list[tuple[str, str, Any]]:
    """Return (name, kind, default) of each parameter of a documented signature."""
    source = f"lambda {ast.unparse(arguments)}: 0"
    return described(eval(source))


def described(function: Callable[..., Any]) -> list[tuple[str, str, Any]]:
    """Return (name, kind, default) of each parameter except self."""
    return [
        (parameter.name, parameter.kind.name, parameter.default)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "self"
    ]


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_python_page_matches_the_code(lang: str) -> None:
    page = (DOCS / lang / "reference" / "python.md").read_text("utf-8")
    assert sorted(re.findall(r"^## (\w+)$", page, re.M)) == sorted(minimind.__all__)
    calls = documented_calls(lang)
    objects = {"minimind": minimind, "model": minimind.Model, "tokenizer": minimind.Tokenizer}
    for name, arguments in calls.items():
        owner, _, function = name.partition(".")
        assert parameters(arguments) == described(getattr(objects[owner], function)), name
    functions = {name for name in minimind.__all__ if inspect.isfunction(getattr(minimind, name))}
    methods = {
        name
        for name, value in vars(minimind.Model).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    documented = {name for name in calls if not name.startswith("tokenizer.")}
    assert documented == {f"minimind.{f}" for f in functions} | {f"model.{m}" for m in methods}
