"""A run is continued for more steps than planned, with its optimizer state."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from minimind.config import load_recipe
from minimind.config.settings import ScheduleSettings
from minimind.errors import CheckpointError, ConfigError
from minimind.training.extend import stable_steps
from minimind.training.schedule import lr_fraction
from tests.support.small_runs import RecordingReporter, lora_settings, metrics
from tests.support.stages import MakeRecipe, assert_same, refused, train

WSD = {"schedule__name": "wsd", "schedule__decay": 0.25, "checkpoint__every": 5}


@pytest.mark.parametrize("num_steps", [1, 2, 7, 100])
@pytest.mark.parametrize("decay", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("final", [0.0, 0.3, 1.0])
def test_stable_steps_end_where_the_learning_rate_leaves_the_peak(
    num_steps: int, decay: float, final: float
) -> None:
    schedule = ScheduleSettings(name="wsd", warmup=0.0, decay=decay, final=final)
    fractions = [lr_fraction(step, num_steps, schedule) for step in range(num_steps)]
    below = [step for step, fraction in enumerate(fractions) if fraction < 1 - 1e-9]
    assert (stable_steps(num_steps, schedule) or 0) == (below[0] if below else num_steps)


def test_a_cosine_schedule_has_no_stable_steps() -> None:
    assert stable_steps(100, ScheduleSettings(name="cosine")) is None


def rates(run: Path) -> dict[int, float]:
    return {line["step"]: line["lr/adamw"] / 1e-3 for line in metrics(run, "train")}


@pytest.mark.parametrize("kind", ["pretrain", "lora", "dpo"])
def test_an_extended_wsd_run_ends_with_the_bits_of_a_longer_one(
    recipe: MakeRecipe, run: Path, tmp_path: Path, kind: str
) -> None:
    more: dict[str, Any] = {"schedule__warmup": 0.0, "validation__every": 100}
    if kind != "pretrain":
        train(recipe(out=tmp_path / "base"))
        more["model__init"] = str(tmp_path / "base")
    if kind == "lora":
        more |= lora_settings()
    if kind == "dpo":
        more["data__seq_len"] = 64
    objective = {"lora": "sft"}.get(kind, kind)
    short, long = (recipe(objective, **WSD | more | {"training__steps": n}) for n in (10, 20))
    train(short)
    branch = stable_steps(10, short.schedule)
    assert branch and (run / "checkpoints" / f"step-{branch:08}").is_dir(), (
        "kept as well as the newest"
    )
    weights = sorted(run.glob("*/*model*.safetensors"))[-1]
    before = weights.read_bytes()
    reporter = RecordingReporter()
    assert train(long, reporter).summary["steps"] == 20
    [line] = [line for line in reporter.lines if "instead of" in line]
    assert line == (
        f"{run}: 20 steps instead of 10, continued from step {branch}, where the learning rate "
        "goes from 1 to 1 of its peak; later checkpoints are renamed to .decayed-step-…"
    )
    assert (run / "checkpoints" / ".decayed-step-00000010").is_dir()
    assert weights.read_bytes() != before
    assert load_recipe(run / "recipe.toml").recipe == long
    [event] = metrics(run, "extended")
    assert event == {"kind": "extended", "step": branch, "from_steps": 10, "to_steps": 20}
    uninterrupted = tmp_path / "uninterrupted"
    train(long.model_copy(update={"out": str(uninterrupted)}))
    log = run / "metrics.jsonl"
    lines = [line for line in log.read_text("utf-8").splitlines() if '"extended"' not in line]
    log.write_text("\n".join(lines) + "\n")
    for decayed in (run / "checkpoints").glob(".decayed-*"):
        shutil.rmtree(decayed)
    for early in (run, uninterrupted):
        shutil.rmtree(early / "checkpoints" / f"step-{branch:08}", ignore_errors=True)
    assert_same(run, uninterrupted)


def test_extending_a_run_does_not_repeat_the_warmup(recipe: MakeRecipe, run: Path) -> None:
    settings = WSD | {"schedule__warmup": 0.1}
    train(recipe(**settings, training__steps=20))
    train(recipe(**settings, training__steps=60))
    fractions = rates(run)
    assert [fractions[step] for step in (1, 2, 3)] == pytest.approx([0.5, 1.0, 1.0])
    assert [fractions[step] for step in range(3, 46)] == pytest.approx([1.0] * 43)
    assert fractions[60] < fractions[50] < 1


def test_a_run_stopped_before_its_decay_repeats_no_step(recipe: MakeRecipe, run: Path) -> None:
    train(recipe(**WSD, training__steps=20, checkpoint__keep=9))
    for path in (run / "checkpoints").iterdir():
        if path.name > "step-00000010":
            shutil.rmtree(path)
    (run / "summary.json").unlink()
    reporter = RecordingReporter()
    train(recipe(**WSD, training__steps=40, checkpoint__keep=9), reporter)
    assert any(
        "continued from step 10, " in line and "renamed" not in line for line in reporter.lines
    )
    assert not list((run / "checkpoints").glob(".decayed-*"))


def test_a_cosine_run_continues_from_its_end_and_reports_the_jump_of_the_rate(
    recipe: MakeRecipe, run: Path
) -> None:
    settings = {"schedule__name": "cosine", "schedule__warmup": 0.0, "schedule__final": 0.1}
    train(recipe(**settings, training__steps=10))
    reporter = RecordingReporter()
    longer = recipe(**settings, training__steps=20)
    assert train(longer, reporter).summary["steps"] == 20
    fraction = lr_fraction(10, 20, longer.schedule)
    [line] = [line for line in reporter.lines if "instead of" in line]
    assert line.startswith(f"{run}: 20 steps instead of 10, continued from step 10, where the ")
    assert f"from {rates(run)[10]:.3g} to {fraction:.3g} of its peak" in line
    assert rates(run)[11] == pytest.approx(fraction)
    assert [line["step"] for line in metrics(run, "train")] == list(range(1, 21))


def test_more_epochs_extend_a_run(recipe: MakeRecipe, run: Path) -> None:
    settings = WSD | {"training__steps": None, "training__global_batch_size": 16}
    first = train(recipe(**settings, training__epochs=1.0)).summary["steps"]
    assert train(recipe(**settings, training__epochs=2.0)).summary["steps"] > first + 10


def test_a_run_is_shortened_before_its_decay(recipe: MakeRecipe, run: Path, tmp_path: Path) -> None:
    settings = WSD | {"schedule__warmup": 0.0, "checkpoint__keep": 9, "validation__every": 100}
    train(recipe(**settings, training__steps=20))
    for path in (run / "checkpoints").iterdir():  # as if stopped after 10 steps
        if path.name > "step-00000010":
            shutil.rmtree(path)
    (run / "summary.json").unlink()
    log = run / "metrics.jsonl"
    lines = log.read_text("utf-8").splitlines()
    log.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= 10))
    message = refused(recipe(**settings, training__steps=11), ConfigError)
    assert "training.steps was 20 and is now 11, but the newest checkpoint is at step 10" in message
    shortest = int(re.search(r"at least (\d+) steps are possible", message)[1])  # type: ignore[index]
    assert (stable_steps(shortest, recipe(**WSD).schedule) or 0) >= 10
    assert (stable_steps(shortest - 1, recipe(**WSD).schedule) or 0) < 10
    reporter = RecordingReporter()
    short = recipe(**settings, training__steps=shortest)
    assert train(short, reporter).summary["steps"] == shortest
    assert f"{shortest} steps instead of 20, continued from step 10" in "".join(reporter.lines)
    train(short.model_copy(update={"out": str(tmp_path / "uninterrupted")}))
    first, second = (
        (folder / "model" / "model.safetensors").read_bytes()
        for folder in (run, tmp_path / "uninterrupted")
    )
    assert first == second


def test_fewer_steps_are_another_recipe(recipe: MakeRecipe, run: Path) -> None:
    train(recipe(**WSD, training__steps=10))
    before = (run / "summary.json").read_bytes()
    message = refused(recipe(**WSD, training__steps=5), ConfigError)
    assert message.startswith(f"{run} holds a run of another recipe: training.steps was 10 and is ")
    assert (run / "summary.json").read_bytes() == before


def test_a_run_without_checkpoints_cannot_be_extended(recipe: MakeRecipe, run: Path) -> None:
    train(recipe(**WSD, training__steps=10))
    shutil.rmtree(run / "checkpoints")
    message = refused(recipe(**WSD, training__steps=20), CheckpointError)
    assert "no checkpoint is left to continue from" in message
    assert json.loads((run / "summary.json").read_text("utf-8"))["steps"] == 10


def test_a_damaged_checkpoint_is_not_extended_from(recipe: MakeRecipe, run: Path) -> None:
    settings = WSD | {"checkpoint__every": 2, "checkpoint__keep": 9, "schedule__warmup": 0.0}
    short = recipe(**settings, training__steps=10)
    train(short)
    branch = stable_steps(10, short.schedule)
    assert branch
    weights = run / "checkpoints" / f"step-{branch:08}" / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    message = refused(recipe(**settings, training__steps=20), CheckpointError)
    assert "is damaged" in message
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
    assert (run / "summary.json").is_file()


def test_a_run_can_be_extended_again(recipe: MakeRecipe, run: Path) -> None:
    for steps in (8, 16, 24):
        assert train(recipe(**WSD, training__steps=steps)).summary["steps"] == steps
    assert [line["step"] for line in metrics(run, "train")] == list(range(1, 25))
