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


def save(run_dir: Path, step: int, validated: int, best: int, value: float) -> Path:
    state: dict[str, Any] = {"validated_step": validated, "validation": {"bits_per_byte": value}}
    state["best"] = {"step": best, "metric": "bits_per_byte", "value": 1.25}
    numbers = {"weight": torch.arange(5000) + step}
    return save_checkpoint(run_dir, step, model=numbers, optimizer=numbers, state=state, keep=9)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose best step is 20; step 25 was not validated."""
    monkeypatch.chdir(tmp_path)
    place = Path("run")
    place.mkdir()
    for step, validated, best, value in [(10, 10, 10, 1.5), (20, 20, 20, 1.25), (25, 20, 20, 1.25)]:
        save(place, step, validated, best, value)
    save(place, 30, 30, 20, 1.75)
    return place


def metrics(*arguments: object) -> tuple[Result, dict[int, dict[str, Any]]]:
    done = run(*arguments, "--json", "metrics.json")
    written = json.loads(Path("metrics.json").read_text("utf-8"))
    return done, {one["step"]: one for one in written["checkpoints"]}


@pytest.mark.parametrize("verb", ["list", "verify"])
def test_list_shows_step_size_validation_best_and_newest(here: Path, verb: str) -> None:
    done, found = metrics(verb, here)
    assert done.exit_code == 0, done.output
    assert list(found) == [10, 20, 25, 30]
    values = [one["validation"].get("bits_per_byte") for one in found.values()]
    assert values == [1.5, 1.25, None, 1.75]
    assert [step for step, one in found.items() if one["best"]] == [20]
    assert [step for step, one in found.items() if one["newest"]] == [30]
    assert not any(one["trouble"] for one in found.values())
    for one in found.values():
        size = sum(file.stat().st_size for file in Path(one["path"]).iterdir())
        assert one["bytes"] == size > 80_000
    assert done.output.count("complete" if verb == "list" else "verified") == 4
    assert "bits per byte 1.25" in done.output


def test_a_checkpoint_with_a_retention_set_alone_is_listed(here: Path) -> None:
    state = {"validated_step": 40, "validation": {"retention_loss": 2.5}, "best": {}}
    numbers = {"weight": torch.arange(5)}
    save_checkpoint(here, 40, model=numbers, optimizer=numbers, state=state, keep=9)
    done, found = metrics("list", here)
    assert done.exit_code == 0, done.output
    assert (found[40]["validation"], found[40]["trouble"]) == ({}, "")


def test_only_verify_finds_a_flipped_bit(here: Path) -> None:
    weights = here / "checkpoints" / "step-00000020" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert run("list", here).exit_code == 0
    done, found = metrics("verify", here)
    assert done.exit_code == 1
    assert "damaged: 1 of 4 checkpoints; the run resumes from the newest valid one" in done.output
    assert [step for step, one in found.items() if one["trouble"]] == [20]
    assert found[20]["trouble"] == "manifest.json does not describe model.safetensors"
    assert found[20]["best"], "later checkpoints record the best step"


@pytest.mark.parametrize("verb", ["list", "verify"])
def test_list_finds_missing_and_truncated_files(here: Path, verb: str) -> None:
    home = here / "checkpoints"
    (home / "step-00000010" / "state.json").unlink()
    (home / "step-00000020" / "manifest.json").write_text("[]")
    with (home / "step-00000025" / "optimizer.safetensors").open("ab") as stream:
        stream.write(b"more")
    (home / "step-00000030" / "state.json").write_text('{"validated_step": 31}')
    (home / "step-00000040").write_text("a file")
    shutil.copytree(home / "step-00000030", home / ".tmp-00000050")
    done, found = metrics(verb, here)
    assert done.exit_code == (1 if verb == "verify" else 0)
    assert list(found) == [10, 20, 25, 30, 40]
    assert all(one["trouble"] for one in found.values())
    assert "state.json: missing" in found[10]["trouble"]
    assert "optimizer.safetensors" in found[25]["trouble"]
    assert "state.json" in found[30]["trouble"]
    assert "damaged: 5 of 5 checkpoints; the run cannot be resumed" in done.output


@pytest.mark.parametrize("verb", ["list", "verify"])
def test_a_checkpoint_that_cannot_be_read_is_listed(here: Path, verb: str) -> None:
    path = here / "checkpoints" / "step-00000040"
    path.symlink_to(path.name)  # a loop
    done, found = metrics(verb, here)
    assert done.exit_code == (1 if verb == "verify" else 0), done.output
    assert (found[40]["saved"], found[40]["bytes"]) == (None, 0)
    assert "symbolic links" in found[40]["trouble"] and not found[30]["trouble"]


@pytest.mark.parametrize("verb", ["list", "verify"])
def test_unknown_files_are_named_but_are_not_damage(here: Path, verb: str) -> None:
    home = here / "checkpoints"
    (home / "step-00000010" / ".DS_Store").touch()
    (home / "step-00000020" / "more.json").touch()
    for name in (".damaged-step-00000015", ".decayed-step-00000040", ".decayed-step-00000040-2"):
        (home / name).mkdir()
    done, found = metrics(verb, here)
    assert done.exit_code == 0
    assert [one["trouble"] for one in found.values()] == ["", "", "", ""]
    output = " ".join(done.output.split())
    assert "step-00000020: not part of a checkpoint: more.json" in output
    assert "damaged checkpoints, quarantined in run/checkpoints: .damaged-step-00000015" in output
    assert "may be deleted: .decayed-step-00000040, .decayed-step-00000040-2" in output
    assert ".DS_Store" not in output


def test_extract_names_the_available_steps(here: Path) -> None:
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
    done = run("extract", here, "--out", ".")
    assert done.stderr.startswith("error: . is the current folder, which cannot be replaced")
    done = run("extract", "nowhere", "--out", "out")
    assert done.stderr.startswith("error: nowhere has no checkpoints; give a run directory")


def test_a_missing_run_prints_one_line_with_advice(here: Path) -> None:
    Path("empty").mkdir()
    Path("runs/first/checkpoints/step-00000002").mkdir(parents=True)
    Path("file").touch()
    give = "give the directory of a run, the --out of a training command"
    for path, message in {
        "nowhere": f"there is no such directory; {give}",
        "file": f"is a file; {give}",
        "empty": "contains no checkpoint; give a run that has saved one",
        "runs": f"contains no checkpoint; give one of {Path('runs/first')}",
    }.items():
        for verb in ("list", "verify"):
            done = run(verb, path)
            assert done.exit_code == 1
            assert done.stderr == f"error: {path}: {message}\n"
