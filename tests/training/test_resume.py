"""Rows 1, 3 and 10 of the reliability promises: stopped and gone on with is never stopped."""

import contextlib
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_runs import Lives, lora_settings, metrics, nano_settings, steps_done, wait_until

from minimind.config import dump_recipe, load_recipe

STEPS = 60
KILLS = 10
INTERRUPTED = 130


def fingerprints(run: Path) -> dict[str, str]:
    """sha256 of the model or adapter, and of the tensors of the last checkpoint."""
    last = max((run / "checkpoints").iterdir())
    [*paths] = [*run.glob("model/*.safetensors"), *run.glob("adapter/*.safetensors")]
    assert len(paths) == 1
    paths += [last / f"{name}.safetensors" for name in ("model", "optimizer")]
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    }


def assert_same(run: Path, other: Path) -> None:
    assert fingerprints(run) == fingerprints(other)
    assert metrics(run) == metrics(other)


class Stage:
    """One stage on files: its settings, and the run that was never interrupted."""

    def __init__(self, objective: str, folder: Path, lives: Lives, **settings: Any) -> None:
        self.objective, self.folder, self.lives = objective, folder, lives
        self.more = settings
        self.whole = folder / f"{objective}-whole"
        assert lives.run("train", settings=self.settings(self.whole)) == 0, lives.output.read_text()
        assert steps_done(self.whole) == STEPS // settings.get("training__log_every", 1)
        before = "model__init" in settings  # the model that it starts from is measured too
        assert len(metrics(self.whole, "validation")) == STEPS // 10 + before

    def settings(self, run: Path, **more: Any) -> dict[str, Any]:
        fixed = {
            "training__steps": STEPS,
            "checkpoint__every": 7,
            "data__store": str(self.folder / "stores"),
            "data__validation_fraction": 0.1,
        }
        return nano_settings(self.objective, run, **fixed, **self.more, **more)

    def arguments(self, run: Path) -> list[str]:
        """The same as a command line."""
        recipe = self.folder / "recipe.toml"
        recipe.write_text(dump_recipe(load_recipe(None, flags=self.settings(run)).recipe))
        return ["train", str(recipe)]


@pytest.fixture(scope="module")
def pretraining(
    corpus: Path, tokenizer_dir: Path, lives: Lives, tmp_path_factory: pytest.TempPathFactory
) -> Stage:
    folder = tmp_path_factory.mktemp("pretraining")
    sources = [str(corpus / "text.jsonl")]
    return Stage("pretrain", folder, lives, data__sources=sources, tokenizer=str(tokenizer_dir))


@pytest.fixture(scope="module")
def tuning(
    corpus: Path, pretraining: Stage, lives: Lives, tmp_path_factory: pytest.TempPathFactory
) -> Stage:
    folder, sources = tmp_path_factory.mktemp("tuning"), [str(corpus / "chat.jsonl")]
    start = str(pretraining.whole / "model")
    settings = {"data__sources": sources, "model__init": start}
    # A checkpoint of an odd step holds half a line of metrics.
    return Stage("sft", folder, lives, training__log_every=2, **settings)


@pytest.fixture(scope="module")
def preferring(
    corpus: Path, pretraining: Stage, lives: Lives, tmp_path_factory: pytest.TempPathFactory
) -> Stage:
    folder, sources = tmp_path_factory.mktemp("preferring"), [str(corpus / "pairs.jsonl")]
    settings = {"data__sources": sources, "model__init": str(pretraining.whole / "model")}
    return Stage("dpo", folder, lives, data__window=64, **settings)


@pytest.fixture(scope="module")
def adapting(
    corpus: Path, pretraining: Stage, lives: Lives, tmp_path_factory: pytest.TempPathFactory
) -> Stage:
    folder, sources = tmp_path_factory.mktemp("adapting"), [str(corpus / "chat.jsonl")]
    start = str(pretraining.whole / "model")
    settings = lora_settings(data__sources=sources, model__init=start)
    return Stage("sft", folder, lives, **settings)


@pytest.fixture(scope="module")
def routing(
    corpus: Path, tokenizer_dir: Path, lives: Lives, tmp_path_factory: pytest.TempPathFactory
) -> Stage:
    """A mixture of experts; half a line of metrics has sums of several numbers."""
    folder, sources = tmp_path_factory.mktemp("routing"), [str(corpus / "text.jsonl")]
    settings = {"data__sources": sources, "tokenizer": str(tokenizer_dir)}
    settings |= {"model__preset": "nano-moe", "training__log_every": 2}
    return Stage("pretrain", folder, lives, **settings)


@pytest.mark.parametrize("name", ["pretraining", "tuning", "routing", "adapting", "preferring"])
def test_ten_random_kills_change_nothing(
    name: str, request: pytest.FixtureRequest, lives: Lives, tmp_path: Path
) -> None:
    """Killed soon after ten random steps, and begun again each time."""
    stage: Stage = request.getfixturevalue(name)
    dice = random.Random(name)
    run = tmp_path / "run"
    settings = stage.settings(run)
    for step in sorted(dice.sample(range(1, STEPS - 8), KILLS)):
        child = lives.start("train", settings=settings, pause_at=step)
        child.wait_for("reached")
        time.sleep(dice.uniform(0, 0.05))
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, lives.output.read_text()
        assert not (run / "model").exists() and not (run / "adapter").exists()
    assert lives.run("train", settings=settings) == 0, lives.output.read_text()
    assert_same(run, stage.whole)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_and_leaves_and_the_same_command_goes_on(
    pretraining: Stage, lives: Lives, tmp_path: Path, stop: signal.Signals
) -> None:
    run = tmp_path / "run"
    arguments = pretraining.arguments(run)
    assert lives.run("minimind", arguments=arguments, signals={"11": [stop]}) == INTERRUPTED
    assert "the same command goes on from there" in lives.output.read_text()
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert saved[-1] in ("step-00000011", "step-00000012")
    assert lives.run("minimind", arguments=arguments, signals={}) == 0, lives.output.read_text()
    assert f"going on from step {int(saved[-1][5:])}" in lives.output.read_text()
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
    third = start_command(arguments)
    before = steps_done(run)
    wait_until(lambda: steps_done(run) >= before + 10)
    third.send_signal(signal.SIGTERM)
    said, _ = third.communicate(timeout=60)  # 10 s are meant, on a machine that is not busy
    assert third.returncode == INTERRUPTED
    assert "going on from step" in said and "stopped after step" in said
    whole, stop = tmp_path / "whole", {str(before + 10): [signal.SIGINT]}
    arguments = [*pretraining.arguments(whole), endless]
    assert lives.run("minimind", arguments=arguments, signals=stop) == INTERRUPTED
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
    assert "is damaged and passed over" in said and newest.name in said
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
