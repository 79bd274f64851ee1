import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minimind.config import load_recipe
from minimind.errors import ConfigError
from minimind.training import stage as stage_module
from minimind.training.checkpoint import newest_state
from minimind.training.run import (
    finished_summary,
    has_begun,
    is_finished,
    is_only_pretrained,
    recipe_changes,
    write_recipe,
)
from minimind.training.stage import prepare_stage
from tests.support.small_runs import RecordingReporter, losses, metrics
from tests.support.stages import MakeRecipe, refused, train


@pytest.mark.parametrize(
    ("path", "begun"),
    [
        ("checkpoints/.tmp-00000007", False),
        ("checkpoints/.damaged-step-00000007", False),
        ("checkpoints", False),
        ("checkpoints/step-00000007", True),
        ("model", True),
        ("adapter", True),
    ],
)
def test_a_run_has_begun_when_there_is_something_to_resume_or_to_lose(
    recipe: MakeRecipe, run: Path, path: str, begun: bool
) -> None:
    run.mkdir()
    write_recipe(run, recipe())
    assert not has_begun(run)
    (run / path).mkdir(parents=True)
    assert has_begun(run) == begun
    other = recipe(optim__lr=0.5)
    if begun:
        with pytest.raises(ConfigError, match=r"optim\.lr was 0\.001 and is now 0\.5"):
            recipe_changes(run, other)
    else:
        assert recipe_changes(run, other) == {}


@pytest.mark.parametrize("path", ["checkpoints/step-00000007", "model", "adapter"])
def test_a_folder_without_a_recipe_is_no_run(recipe: MakeRecipe, run: Path, path: str) -> None:
    """Such as out/demo, which has a model and the summary of all stages."""
    (run / path).mkdir(parents=True)
    (run / path / "weights").touch()
    (run / "summary.json").write_text('{"questions": []}')
    for fresh in (False, True):
        assert refused(recipe(), ConfigError, fresh=fresh) == (
            f"{(run / path).parent if 'step' in path else run / path} exists, but {run} has no "
            "recipe.toml: no training run has made it, or its recipe was removed. Choose another "
            "--out"
        )
    assert (run / path / "weights").is_file() and (run / "summary.json").is_file()


@pytest.mark.parametrize("key", ["sources", "validation", "retention"])
def test_a_run_in_a_folder_of_data_is_refused(
    recipe: MakeRecipe, tmp_path: Path, corpus: Path, key: str
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    shutil.copy(corpus / "text.jsonl", folder)
    run = folder / "out" / "small"
    for path in (str(folder), f"{tmp_path}/t*/**/*.jsonl"):
        files = {f"data__{key}": [{"path": path}], "out": run}
        message = refused(recipe(**files), ConfigError)
        assert message.startswith(f"{run} is inside the data {path}, so the files of the run")
    assert [path.name for path in folder.iterdir()] == ["text.jsonl"]


def test_a_run_is_finished_when_its_summary_and_its_model_exist(
    recipe: MakeRecipe, run: Path
) -> None:
    run.mkdir()
    write_recipe(run, recipe())
    (run / "summary.json").write_text('{"steps": 5}')
    assert finished_summary(run, recipe()) is None
    (run / "model").mkdir()
    assert finished_summary(run, recipe()) == {"steps": 5}
    assert is_finished(run, recipe())
    assert is_finished(run, recipe(out=run.parent / "moved", training__log_every=3))
    assert not is_finished(run, recipe(seed=8))
    (run / "summary.json").write_text('{"ste')
    assert finished_summary(run, recipe()) is None


def test_the_recipe_tells_a_model_that_was_only_pretrained(recipe: MakeRecipe, run: Path) -> None:
    (run / "model").mkdir(parents=True)
    assert not is_only_pretrained(run)
    base = str(run.parent / "base")
    for settings, expected in (
        ({"objective": "pretrain"}, True),
        ({"objective": "pretrain", "model__init": base}, False),  # the base may be a chat model
        ({"objective": "sft", "model__init": base}, False),
    ):
        write_recipe(run, recipe(settings.pop("objective"), **settings))
        assert is_only_pretrained(run) == is_only_pretrained(run / "model") == expected
    (run / "recipe.toml").write_text("objective = ")
    assert not is_only_pretrained(run)


# Operation settings may change between a stop and a resume; identity settings may not.


@pytest.fixture
def stopped(recipe: MakeRecipe, run: Path) -> dict[str, Any]:
    """Leave a run of 10 steps as if it had been killed after the checkpoint of step 4.

    Returns its settings.
    """
    settings = {"training__steps": 10, "checkpoint__every": 4, "checkpoint__keep": 9}
    settings |= {"validation__every": 100}
    train(recipe(**settings))
    shutil.copytree(run, run.parent / "uninterrupted")
    for name in ("step-00000008", "step-00000010"):
        shutil.rmtree(run / "checkpoints" / name)
    shutil.rmtree(run / "model")
    (run / "summary.json").unlink()
    return settings


def test_operation_settings_may_change_and_are_reported_and_recorded(
    recipe: MakeRecipe, run: Path, stopped: dict[str, Any]
) -> None:
    reporter = RecordingReporter()
    changed = {
        "training__log_every": 3,
        "training__micro_batch_size": 1,
        "training__activation_checkpointing": True,
        "checkpoint__keep": 1,
        "validation__prompts": ["长江"],
        "data__max_invalid_fraction": 0.5,
        "data__store": str(run.parent / "other-stores"),
    }
    again = recipe(**stopped | changed)
    assert train(again, reporter).summary["steps"] == 10
    [line] = [line for line in reporter.lines if line.startswith("changed since")]
    assert "training.log_every was 1 and is now 3" in line
    assert "training.micro_batch_size was 2 and is now 1" in line
    assert line.count(" was ") == len(changed)
    assert load_recipe(run / "recipe.toml").recipe == again
    state = newest_state(run)
    assert state and state["micro_batch"] == 1
    steps = [line["step"] for line in metrics(run, "train")]
    assert steps == [1, 2, 3, 4, 6, 9, 10]
    expected = losses(run.parent / "uninterrupted")
    assert losses(run)[:4] == expected[:4]
    assert losses(run)[4] == pytest.approx(sum(expected[4:6]) / 2, rel=1e-5)


def test_throughput_covers_the_steps_since_the_last_line(
    recipe: MakeRecipe, run: Path, stopped: dict[str, Any]
) -> None:
    train(recipe(**stopped | {"training__log_every": 6}))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    rates = {x["step"]: x for x in lines if x["kind"] == "train"}
    assert list(rates) == [1, 2, 3, 4, 6, 10]
    seconds = rates[6]["elapsed_s"] - rates[4]["elapsed_s"]
    assert rates[6]["tokens_per_second"] == pytest.approx(2 * 4 * 32 / seconds, rel=1e-6)


def test_identity_settings_may_not_change(
    recipe: MakeRecipe, run: Path, stopped: dict[str, Any]
) -> None:
    changed = {"optim__lr": 0.5, "training__log_every": 3, "seed": 1, "training__steps": 20}
    message = refused(recipe(**stopped | changed), ConfigError)
    assert message.startswith(f"{run} holds a run of another recipe: ")
    for part in ("seed was 7 and is now 1", "optim.lr was 0.001", "training.steps was 10"):
        assert part in message
    assert "log_every" not in message
    assert load_recipe(run / "recipe.toml").recipe == recipe(**stopped)


def test_another_spelling_of_a_path_is_the_same_path(
    recipe: MakeRecipe, run: Path, stopped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = recipe(**stopped)
    monkeypatch.chdir(Path(before.tokenizer or "").parent)
    tokenizer = f"./{Path(before.tokenizer or '').name}/"
    sources = [f"./{os.path.relpath(file.path)}" for file in before.data.sources]
    again = recipe(**stopped | {"tokenizer": tokenizer, "data__sources": sources})
    assert recipe_changes(run, again) == {}
    other = recipe(**stopped | {"tokenizer": f"{tokenizer}other"})
    assert "tokenizer was" in refused(other, ConfigError)


def test_a_run_may_move_with_the_folder_around_it(recipe: MakeRecipe, tmp_path: Path) -> None:
    """A road continues after it was copied: its tokenizer and earlier model have moved too."""
    before = tmp_path / "before"
    inside = {"out": f"{before}/sft", "tokenizer": f"{before}/tokenizer"}
    inside["model__init"] = f"{before}/pretrain"
    write_recipe(tmp_path / "before/sft", recipe(**inside))
    (tmp_path / "before/sft/checkpoints/step-00000007").mkdir(parents=True)
    after = tmp_path / "a" / "copy"
    shutil.copytree(before, after)
    moved = {key: path.replace(str(before), str(after)) for key, path in inside.items()}
    assert recipe_changes(after / "sft", recipe(**moved)) == {}
    # Nothing has moved for a run whose tokenizer is elsewhere.
    assert recipe_changes(after / "sft", recipe(**inside | {"out": moved["out"]})) == {}
    other = moved | {"tokenizer": str(tmp_path / "tokenizer")}
    with pytest.raises(ConfigError, match="tokenizer was"):
        recipe_changes(after / "sft", recipe(**other))


def test_changed_operation_settings_do_not_touch_a_finished_run(
    recipe: MakeRecipe, run: Path
) -> None:
    first = train(recipe())
    reporter = RecordingReporter()
    assert train(recipe(training__log_every=3), reporter) == replace(first, trained=False)
    assert reporter.lines == [f"{run} is already finished, after 5 steps; nothing was trained"]
    assert load_recipe(run / "recipe.toml").recipe == recipe()


# On resume the micro-batch size is the smallest of saved, requested and fitting.


KEPT = "micro-batch size 2, that of the checkpoint, is kept"
TOO_LARGE = "micro-batch size 1 instead of 2: no more sequences fit"
CHANGED = "changed since "


@pytest.mark.parametrize(
    ("requested", "fits", "chosen", "reported"),
    [
        (2, 4, 2, []),
        (4, 4, 2, [KEPT]),
        (1, 4, 1, [CHANGED]),
        (2, 1, 1, [TOO_LARGE]),
        (4, 1, 1, [TOO_LARGE]),
        (None, 4, 2, [CHANGED]),
        (None, 1, 1, [TOO_LARGE, CHANGED]),
    ],
)
def test_the_micro_batch_size_on_resume(
    recipe: MakeRecipe,
    run: Path,
    stopped: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    requested: int | None,
    fits: int,
    chosen: int,
    reported: list[str],
) -> None:
    again = recipe(**stopped | {"training__micro_batch_size": requested})
    prepared = prepare_stage(again, reporter=RecordingReporter())
    from minimind.training.build import build_footprint

    needed = build_footprint(again, prepared.trainer.model, prepared.trainer.device).total(fits)
    monkeypatch.setattr(stage_module, "free_bytes", lambda device: needed)
    reporter = RecordingReporter()
    assert train(again, reporter).summary["steps"] == 10
    state = newest_state(run)
    assert state and state["micro_batch"] == chosen
    lines = [line for line in reporter.lines if "micro" in line]
    assert [start for start in (KEPT, TOO_LARGE, CHANGED) for x in lines if start in x] == reported
    assert len(lines) == len(reported)
