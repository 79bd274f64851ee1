"""Rows 1, 3 and 10 of the reliability promises: stopped and gone on with is never stopped."""

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

from tests.support.small_runs import Lives, metrics, steps_done, wait_until
from tests.support.stages import INTERRUPTED, KINDS, Stage, assert_same, kill_repeatedly, make_stage

KILLS = 10


@pytest.fixture(scope="module")
def stage_of(
    corpus: Path, tokenizer_dir: Path, lives: Lives, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Stage]:
    """The stage of a kind, run without interruption when it is first asked for."""
    made: dict[str, Stage] = {}

    def stage(kind: str) -> Stage:
        if kind not in made:
            start = stage("pretrain").whole if kind not in ("pretrain", "moe") else None
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = make_stage(kind, corpus, tokenizer_dir, start, folder, lives)
        return made[kind]

    return stage


@pytest.fixture
def pretraining(stage_of: Callable[[str], Stage]) -> Stage:
    return stage_of("pretrain")


@pytest.mark.parametrize("kind", KINDS)
def test_ten_random_kills_change_nothing(
    kind: str, stage_of: Callable[[str], Stage], tmp_path: Path
) -> None:
    """Killed soon after ten random steps, and begun again each time."""
    stage, run = stage_of(kind), tmp_path / "run"
    kill_repeatedly(stage, run, random.Random(kind), KILLS)
    assert_same(run, stage.whole)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_and_leaves_and_the_same_command_goes_on(
    pretraining: Stage, lives: Lives, tmp_path: Path, stop: signal.Signals
) -> None:
    run = tmp_path / "run"
    arguments = pretraining.arguments(run)
    assert lives.run("minimind", arguments=arguments, signals={"11": [stop]}) == INTERRUPTED
    assert "run the same command again to resume" in lives.output.read_text()
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert saved[-1] in ("step-00000011", "step-00000012")
    assert lives.run("minimind", arguments=arguments, signals={}) == 0, lives.output.read_text()
    assert f"resuming from step {int(saved[-1][5:])}" in lives.output.read_text()
    assert_same(run, pretraining.whole)


def test_a_second_one_leaves_at_once(pretraining: Stage, lives: Lives, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments, twice = pretraining.arguments(run), {"11": [signal.SIGTERM, signal.SIGINT]}
    assert lives.run("minimind", arguments=arguments, signals=twice) == INTERRUPTED
    assert "stopped" in lives.output.read_text()
    assert "Traceback" not in lives.output.read_text()
    saved = {path.name for path in (run / "checkpoints").glob("step-*")}
    assert saved in ({"step-00000007"}, {"step-00000007", "step-00000010"})  # it did not wait
    assert lives.run("minimind", arguments=arguments, signals={}) == 0
    assert_same(run, pretraining.whole)


@pytest.fixture
def start_command() -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Starts `minimind` with arguments; what still runs in the end is killed."""
    with contextlib.ExitStack() as stack:

        def start(arguments: list[str]) -> subprocess.Popen[str]:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "minimind", *arguments],
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            return process

        yield start


def test_the_command_itself_killed_locked_and_stopped(
    pretraining: Stage,
    lives: Lives,
    tmp_path: Path,
    start_command: Callable[[list[str]], subprocess.Popen[str]],
) -> None:
    """Row 10 too: while it runs, a second one on its directory is told who holds it."""
    run = tmp_path / "run"
    endless = "training.steps=100000"
    arguments = [*pretraining.arguments(run), endless]
    first = start_command(arguments)
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
        going_on = start_command(arguments)
        before = steps_done(run)
        wait_until(lambda before=before: steps_done(run) >= before + 10)
        going_on.send_signal(stop)
        said, _ = going_on.communicate(timeout=10)  # as is promised
        assert going_on.returncode == INTERRUPTED
        assert "resuming from step" in said and "stopped after step" in said
    whole, signals = tmp_path / "whole", {str(before + 10): [signal.SIGINT]}
    arguments = [*pretraining.arguments(whole), endless]
    assert lives.run("minimind", arguments=arguments, signals=signals) == INTERRUPTED
    assert metrics(run)[: before + 10] == metrics(whole)[: before + 10]


def test_a_damaged_checkpoint_is_said_and_the_one_before_gives_the_same_end(
    pretraining: Stage, lives: Lives, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = pretraining.arguments(run)
    assert (
        lives.run("minimind", arguments=arguments, signals={"20": [signal.SIGINT]}) == INTERRUPTED
    )
    newest = max((run / "checkpoints").iterdir())
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 4
    weights.write_bytes(content)
    assert lives.run("minimind", arguments=arguments, signals={}) == 0
    said = lives.output.read_text()
    assert "is damaged and skipped" in said and newest.name in said
    assert_same(run, pretraining.whole)


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(
    pretraining: Stage, lives: Lives, tmp_path: Path
) -> None:
    """Row 5 for a whole run: from step 11 on, files may not be as large as a checkpoint's.

    By then step 7 is saved, since step 10, the best by validation so far, was being saved.
    """
    run = tmp_path / "run"
    settings = pretraining.settings(run)
    moments = max((pretraining.whole / "checkpoints").iterdir()) / "optimizer.safetensors"
    limits = {"11": moments.stat().st_size - 1}
    assert lives.run("train", settings=settings, limits=limits) == 1
    said = lives.output.read_text()
    assert re.search(r"ResourceError: .*step-000000(10|14): the checkpoint could not be", said)
    saved = {path.name for path in (run / "checkpoints").iterdir()}
    assert saved in ({"step-00000007"}, {"step-00000007", "step-00000010"})
    assert lives.run("train", settings=settings) == 0
    assert_same(run, pretraining.whole)
