import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from minimind.cli.main import app
from minimind.training.checkpoint import save_checkpoint


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["checkpoints", *map(str, arguments)])


def save(at: Path, step: int, validated: int, best: int, value: float) -> Path:
    state: dict[str, Any] = {"validated_step": validated, "validation": {"bits_per_byte": value}}
    state["best"] = {"step": best, "metric": "bits_per_byte", "value": 1.25}
    numbers = {"weight": torch.arange(5000) + step}
    return save_checkpoint(at, step, model=numbers, optimizer=numbers, state=state, keep=9)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of which step 20 was the best; step 25 was not validated."""
    monkeypatch.chdir(tmp_path)
    place = Path("run")
    place.mkdir()
    for step, validated, best, value in [(10, 10, 10, 1.5), (20, 20, 20, 1.25), (25, 20, 20, 1.25)]:
        save(place, step, validated, best, value)
    save(place, 30, 30, 20, 1.75)
    return place


def metrics(*arguments: object) -> tuple[Result, dict[int, dict[str, Any]]]:
    done = run(*arguments, "--json", "figures.json")
    written = json.loads(Path("figures.json").read_text("utf-8"))
    return done, {one["step"]: one for one in written["checkpoints"]}


@pytest.mark.parametrize("verb", ["list", "verify"])
def test_steps_sizes_validation_best_and_newest(here: Path, verb: str) -> None:
    done, told = metrics(verb, here)
    assert done.exit_code == 0, done.output
    assert list(told) == [10, 20, 25, 30]
    values = [one["validation"].get("bits_per_byte") for one in told.values()]
    assert values == [1.5, 1.25, None, 1.75]
    assert [step for step, one in told.items() if one["best"]] == [20]
    assert [step for step, one in told.items() if one["newest"]] == [30]
    assert not any(one["trouble"] for one in told.values())
    for one in told.values():
        size = sum(file.stat().st_size for file in Path(one["path"]).iterdir())
        assert one["bytes"] == size > 80_000
    assert done.output.count("complete" if verb == "list" else "whole") == 4
    assert "bits per byte 1.25" in done.output


def test_a_flipped_bit_is_found_by_reading_alone(here: Path) -> None:
    weights = here / "checkpoints" / "step-00000020" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert run("list", here).exit_code == 0
    done, told = metrics("verify", here)
    assert done.exit_code == 1
    assert "1 of 4 damaged; the run goes on from the newest whole one" in done.output
    assert [step for step, one in told.items() if one["trouble"]] == [20]
    assert told[20]["trouble"] == "manifest.json does not describe model.safetensors"
    assert told[20]["best"], "the ones after it remember"


@pytest.mark.parametrize("verb", ["list", "verify"])
def test_what_else_is_wrong_is_seen_without_reading_all(here: Path, verb: str) -> None:
    home = here / "checkpoints"
    (home / "step-00000010" / "state.json").unlink()
    (home / "step-00000020" / "manifest.json").write_text("[]")
    with (home / "step-00000025" / "optimizer.safetensors").open("ab") as stream:
        stream.write(b"more")
    (home / "step-00000030" / "state.json").write_text('{"validated_step": 31}')
    (home / "step-00000040").write_text("a file")
    shutil.copytree(home / "step-00000030", home / ".tmp-00000050")
    done, told = metrics(verb, here)
    assert done.exit_code == (1 if verb == "verify" else 0)
    assert list(told) == [10, 20, 25, 30, 40]
    assert all(one["trouble"] for one in told.values())
    assert "state.json: missing" in told[10]["trouble"]
    assert "optimizer.safetensors" in told[25]["trouble"]
    assert "state.json" in told[30]["trouble"]
    assert "5 of 5 damaged; the run cannot go on" in done.output


@pytest.mark.parametrize("verb", ["list", "verify"])
def test_stray_files_are_no_damage_and_others_are_named(here: Path, verb: str) -> None:
    home = here / "checkpoints"
    (home / "step-00000010" / ".DS_Store").touch()
    (home / "step-00000020" / "more.json").touch()
    (home / ".damaged-step-00000015").mkdir()
    done, told = metrics(verb, here)
    assert done.exit_code == 0
    assert [one["trouble"] for one in told.values()] == ["", "", "", ""]
    said = " ".join(done.output.split())
    assert "step-00000020: more.json does not belong to a checkpoint" in said
    assert "because they were damaged: .damaged-step-00000015" in said
    assert ".DS_Store" not in said


def test_one_that_is_not_kept_is_not_extracted(here: Path) -> None:
    done = run("extract", here, "--step", 15, "--out", "out")
    assert done.exit_code == 1
    assert done.stderr == (
        "error: run: there is no checkpoint of step 15; available: 10, 20, 25, 30\n"
    )
    shutil.rmtree(here / "checkpoints" / "step-00000020")
    done = run("extract", here, "--out", "out")
    assert done.stderr == (
        "error: run: there is no checkpoint of step 20, which was the best; available: 10, 25, 30\n"
    )
    done = run("extract", "nowhere", "--out", "out")
    assert done.stderr.startswith("error: nowhere has no checkpoints; give a run directory")


def test_no_run_and_no_checkpoints_are_said_in_one_line(here: Path) -> None:
    Path("empty").mkdir()
    for place in ("empty", "nowhere"):
        done = run("verify", place)
        assert done.exit_code == 1
        assert done.stderr.startswith(f"error: {place}: there are no checkpoints; give a run")
        assert len(done.stderr.splitlines()) == 1
