"""Runs that are killed, stopped, damaged or out of disk space end as if never interrupted."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.commands import fast_python
from tests.support.small_runs import ForkServer, metrics, steps_done, wait_until
from tests.support.stages import INTERRUPTED, KINDS, Stage, assert_same, kill_repeatedly, make_stage

KILLS = 10


@pytest.fixture(scope="module")
def stage_of(
    corpus: Path,
    tokenizer_dir: Path,
    fork_server: ForkServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Stage]:
    """Return a function that creates the stage of a kind, once, with its uninterrupted run."""
    stages: dict[str, Stage] = {}

    def stage(kind: str) -> Stage:
        if kind not in stages:
            start = stage("pretrain").uninterrupted if kind not in ("pretrain", "moe") else None
            folder = tmp_path_factory.mktemp(kind)
            stages[kind] = make_stage(kind, corpus, tokenizer_dir, start, folder, fork_server)
        return stages[kind]

    return stage


@pytest.fixture
def pretraining(stage_of: Callable[[str], Stage]) -> Stage:
    return stage_of("pretrain")


@pytest.mark.parametrize("kind", KINDS)
def test_ten_random_kills_change_nothing(
    kind: str, stage_of: Callable[[str], Stage], tmp_path: Path
) -> None:
    """The run is killed soon after each of ten random steps and resumed each time."""
    stage, run = stage_of(kind), tmp_path / "run"
    kill_repeatedly(stage, run, random.Random(kind), KILLS)
    assert_same(run, stage.uninterrupted)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_resumes(
    pretraining: Stage, fork_server: ForkServer, tmp_path: Path, stop: signal.Signals
) -> None:
    run = tmp_path / "run"
    arguments = pretraining.arguments(run)
    assert fork_server.run("minimind", arguments=arguments, signals={"11": [stop]}) == INTERRUPTED
    assert "run the same command again to resume" in fork_server.output.read_text()
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert saved[-1] in ("step-00000011", "step-00000012")
    assert fork_server.run("minimind", arguments=arguments, signals={}) == 0, (
        fork_server.output.read_text()
    )
    assert f"resuming from step {int(saved[-1][5:])}" in fork_server.output.read_text()
    assert_same(run, pretraining.uninterrupted)


def test_a_second_signal_stops_immediately(
    pretraining: Stage, fork_server: ForkServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments, twice = pretraining.arguments(run), {"11": [signal.SIGTERM, signal.SIGINT]}
    assert fork_server.run("minimind", arguments=arguments, signals=twice) == INTERRUPTED
    assert "stopped" in fork_server.output.read_text()
    assert "Traceback" not in fork_server.output.read_text()
    saved = {path.name for path in (run / "checkpoints").glob("step-*")}
    assert saved in ({"step-00000007"}, {"step-00000007", "step-00000010"})  # no save of step 11
    assert fork_server.run("minimind", arguments=arguments, signals={}) == 0
    assert_same(run, pretraining.uninterrupted)


@pytest.fixture
def start_command() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts `minimind`; processes that still run at the end are killed.

    real: the returned process is the command itself, with its process id.
    """
    with contextlib.ExitStack() as stack:

        def start(arguments: list[str], real: bool = False) -> subprocess.Popen[str]:
            process = stack.enter_context(
                subprocess.Popen(
                    [*([sys.executable] if real else fast_python()), "-m", "minimind", *arguments],
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            return process

        yield start


def test_the_command_is_locked_while_it_runs_and_resumes_after_a_kill_and_signals(
    pretraining: Stage,
    fork_server: ForkServer,
    tmp_path: Path,
    start_command: Callable[..., subprocess.Popen[str]],
) -> None:
    """A second command on the same run directory fails and names the process with the lock."""
    run = tmp_path / "run"
    endless = "training.steps=100000"
    arguments = [*pretraining.arguments(run), endless]
    first = start_command(arguments, True)
    wait_until(lambda: steps_done(run) >= 8)
    second = start_command(arguments)
    _, message = second.communicate()
    assert second.returncode == 1
    assert message.startswith(f"error: {run} is in use by process {first.pid} on ")
    assert len(message.splitlines()) == 1
    first.kill()
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    for stop in (signal.SIGTERM, signal.SIGINT):
        resumed = start_command(arguments)
        before = steps_done(run)
        wait_until(lambda before=before: steps_done(run) >= before + 10)
        resumed.send_signal(stop)
        output, _ = resumed.communicate(timeout=10)
        assert resumed.returncode == INTERRUPTED
        assert "resuming from step" in output and "stopped after step" in output
    uninterrupted, signals = tmp_path / "uninterrupted", {str(before + 10): [signal.SIGINT]}
    arguments = [*pretraining.arguments(uninterrupted), endless]
    assert fork_server.run("minimind", arguments=arguments, signals=signals) == INTERRUPTED
    assert metrics(run)[: before + 10] == metrics(uninterrupted)[: before + 10]


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_resumed(
    pretraining: Stage, fork_server: ForkServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = pretraining.arguments(run)
    assert (
        fork_server.run("minimind", arguments=arguments, signals={"20": [signal.SIGINT]})
        == INTERRUPTED
    )
    newest = max((run / "checkpoints").iterdir())
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 4
    weights.write_bytes(content)
    assert fork_server.run("minimind", arguments=arguments, signals={}) == 0
    output = fork_server.output.read_text()
    assert "is damaged and skipped" in output and newest.name in output
    assert_same(run, pretraining.uninterrupted)


def test_a_full_disk_is_an_error_and_the_run_resumes_when_there_is_room(
    pretraining: Stage, fork_server: ForkServer, tmp_path: Path
) -> None:
    """From step 11 on, files may not be as large as those of a checkpoint.

    Step 7 is complete by then: step 10, the best by validation so far, is being saved.
    """
    run = tmp_path / "run"
    settings = pretraining.settings(run)
    moments = max((pretraining.uninterrupted / "checkpoints").iterdir()) / "optimizer.safetensors"
    limits = {"11": moments.stat().st_size - 1}
    assert fork_server.run("train", settings=settings, limits=limits) == 1
    output = fork_server.output.read_text()
    assert re.search(r"ResourceError: .*step-000000(10|14): the checkpoint could not be", output)
    saved = {path.name for path in (run / "checkpoints").iterdir()}
    assert saved in ({"step-00000007"}, {"step-00000007", "step-00000010"})
    assert fork_server.run("train", settings=settings) == 0
    assert_same(run, pretraining.uninterrupted)
