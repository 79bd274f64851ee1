import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from minimind.config.model import PRESETS
from minimind.errors import ResourceError
from minimind.model import Transformer
from minimind.planning import attainable, bench

RECORDS = Path(__file__).parents[2] / "benchmarks/records"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_recipe_that_fits_its_context(preset: str) -> None:
    recipe = bench.bench_recipe(preset, "cpu")
    assert recipe.model.preset == preset
    assert recipe.data.seq_len <= int(PRESETS[preset]["max_position_embeddings"])


def test_recorded_speeds_stand_in_their_records() -> None:
    """No speed is invented: each number is in the record that the entry names."""
    recorded = [machine for preset in PRESETS for machine in bench.recorded_machines(preset)]
    assert recorded
    for machine in recorded:
        text = (RECORDS / machine["record"]).read_text("utf-8")
        speeds = [machine.get("training"), *_values(machine.get("decoding", {}))]
        for speed in filter(None, speeds):
            assert re.search(rf"\b{speed:,}\b", text), machine
        assert machine["date"] in text


def _values(decoding: dict[str, dict[str, int]]) -> list[int]:
    return [speed for streams in decoding.values() for speed in streams.values()]


@pytest.fixture
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attainable, "_CPU_SHAPES", ((64, 64, 64), (128, 32, 64)))


@pytest.mark.usefixtures("small_products")
def test_training_is_compared_with_matrix_products() -> None:
    metrics = bench.training_speed("nano", "cpu", 0)
    assert metrics["parameters"] == 223_392
    assert metrics["tokens_per_second"] > 0 and metrics["attainable_flops"] > 0
    assert 128 % metrics["micro_batch_size"] == 0
    assert metrics["flops_per_token"] == bench.training_flops_per_token("nano")


def test_utilisation_is_the_share_of_the_attainable_flops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flops = bench.training_flops_per_token("nano")
    monkeypatch.setattr(bench, "measure_throughput", lambda *_: 1e12 / flops)
    monkeypatch.setattr(bench, "attainable_flops", lambda *_: 5e12)
    recipe, cpu = bench.bench_recipe("nano", "cpu"), torch.device("cpu")
    model = Transformer(recipe.model.shape(bench.vocab_size("nano")))
    metrics = bench.measure_utilisation(recipe, model, cpu, 1, torch.float32, 0, 3e12)
    assert metrics["attainable_flops"] == 4e12  # the median of before and after
    assert metrics["utilisation"] == pytest.approx(0.25)


@pytest.mark.parametrize("int8", [False, True])
def test_decoding_is_measured_with_one_and_many_streams(int8: bool) -> None:
    metrics = bench.decoding_speed("nano", "cpu", 0, int8)
    assert metrics["streams_1"] > 0 and metrics["streams_16"] > 0
    assert metrics["peak_memory_bytes"] > 100 << 20


def test_what_does_not_fit_into_memory_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(*arguments: object) -> dict[str, object]:
        raise ResourceError("too little memory on cpu")

    monkeypatch.setattr(bench, "training_speed", too_large)
    bench._answer("training_speed", "base", "cpu", 1.0)
    assert json.loads(capsys.readouterr().out) == {"error": "too little memory on cpu"}


def test_a_measurement_that_is_killed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ResourceError, match="ended with status 1; it may have run out of memory"):
        bench._in_process("training_speed", "nano", "cpu", 1.0)
