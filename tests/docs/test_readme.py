"""The figures in the READMEs agree with the records."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from minimind.config.model import PRESETS, ModelConfig
from minimind.model.empty import empty_transformer

ROOT = Path(__file__).parents[2]
CONTENDERS = ("minimind", "Trainer", "Trainer bf16", "Trainer bf16 packed")


@cache
def record(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "records" / f"{name}.json").read_text("utf-8"))


@pytest.fixture(params=["README.md", "README.zh-CN.md"])
def rows(request: pytest.FixtureRequest) -> list[list[str]]:
    """The numbers of each line, as they are written."""
    lines = (ROOT / request.param).read_text("utf-8").splitlines()
    return [re.findall(r"\d+(?:[,.]\d+)*", line) for line in lines]


def assert_a_line_has(rows: list[list[str]], *numbers: str) -> None:
    assert any(set(numbers) <= set(row) for row in rows), numbers


def test_the_demo(rows: list[list[str]]) -> None:
    summary = record("demo-summary")
    quiz, pretrain = summary["quiz"], summary["stages"]["pretrain"]
    assert_a_line_has(rows, f"{summary['training_seconds']:.0f}")
    assert_a_line_has(rows, *(str(quiz[key]) for key in ("questions", "correct", "fluent")))
    losses = pretrain["bits_per_byte"], summary["unigram_bits_per_byte"]
    assert_a_line_has(rows, *(f"{loss:.2f}" for loss in losses))


def test_the_speed_of_training_and_the_time_that_follows(rows: list[list[str]]) -> None:
    speeds = record("training-speed-small")["over_rounds"]["small-16x512"]
    ours, *others = (speeds[name]["real_tokens_per_second"]["median"] for name in CONTENDERS)
    assert_a_line_has(rows, *(f"{speed:,.0f}" for speed in (ours, *others)))
    model = empty_transformer(ModelConfig(**PRESETS["small"]))
    tokens = 20 * sum(parameter.numel() for parameter in model.parameters())
    assert_a_line_has(rows, f"{tokens / ours / 3600:.0f}", "2")  # hours, GB of text


def test_the_speed_of_decoding(rows: list[list[str]]) -> None:
    speeds = record("decoding-speed")["over_rounds"]
    contenders = "minimind bf16", "transformers bf16", "llama.cpp F16"
    eight_bits = "minimind int8", "llama.cpp Q8_0, not repacked"
    for streams, names in (("1", (*contenders, *eight_bits)), ("16", contenders)):
        medians = [speeds[name][f"streams_{streams}"]["median"] for name in names]
        assert_a_line_has(rows, *(f"{median:,.0f}" for median in medians))
