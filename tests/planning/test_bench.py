import os
import re
from pathlib import Path

import pytest
import torch

from minimind.config.model import PRESETS
from minimind.errors import ResourceError
from minimind.planning import bench
from minimind.planning.attainable import attainable_flops

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


def test_attainable_flops_are_those_of_a_matrix_product() -> None:
    assert attainable_flops(torch.device("cpu"), torch.float32, 0) > 1e8


def _too_large() -> dict[str, int]:
    raise ResourceError("too little memory on cpu")


def _killed() -> dict[str, int]:
    os.kill(os.getpid(), 9)
    raise AssertionError


def test_what_does_not_fit_into_memory_is_reported() -> None:
    assert bench._in_process(_too_large) == {"error": "too little memory on cpu"}
    with pytest.raises(ResourceError, match="ended with status -9; it may have run out of memory"):
        bench._in_process(_killed)
