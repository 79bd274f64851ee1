"""Engines give the same bytes; errors and lost workers become messages."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from minimind.data.prepare.engine import EngineName, Task, open_engine
from minimind.errors import DataError, ResourceError
from tests.data.prepare.test_pipeline import hashes, inputs, run

__all__ = ["inputs"]


def double(number: int) -> dict[str, Any]:
    return {"result": 2 * number, "process": os.getpid()}


def fail(number: int) -> dict[str, Any]:
    raise DataError(f"damaged: {number}")


def die(number: int) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def tasks(function: Any, count: int) -> list[Task]:
    return [Task(str(number), function, (number,), 1) for number in range(count)]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_and_errors(workers: int) -> None:
    with open_engine("pool", workers) as engine:
        results = {task.name: result["result"] for task, result in engine.run(tasks(double, 9))}
        assert results == {str(number): 2 * number for number in range(9)}
        with pytest.raises(DataError, match="damaged: "):
            list(engine.run(tasks(fail, 3)))


def test_a_killed_worker_is_reported() -> None:
    with (
        pytest.raises(ResourceError, match="finished work is kept"),
        open_engine("pool", 2) as engine,
    ):
        list(engine.run(tasks(die, 2)))


@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes_gives_the_same_bytes(
    inputs: list[Path], tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    engines: tuple[EngineName, ...] = ("pool", "ray")
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        for name in engines:
            run(inputs, tmp_path / name, tokenizer=tokenizer_dir, workers=2, engine=name)
        with open_engine("ray", 2) as engine, pytest.raises(DataError, match="damaged: 0"):
            list(engine.run(tasks(fail, 1)))
    finally:
        cluster.shutdown()
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "pool")
