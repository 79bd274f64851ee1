"""`minimind export torch` and `minimind import`: files, tables and refusals."""

import contextlib
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from minimind.cli.main import app
from minimind.model import PRESETS, ModelConfig, Transformer, save_model
from minimind.tokenizer import Tokenizer


def run(folder: Path, *arguments: object, status: int = 0) -> Result:
    with contextlib.chdir(folder):
        done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "100"})
    assert done.exit_code == status, done.output
    return done


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A folder with a model in the run directory `run` and its weights as `x.pth`."""
    config = ModelConfig(**PRESETS["nano"] | {"vocab_size": tokenizer.vocab_size})
    save_model(tmp_path / "run" / "model", Transformer(config), tokenizer)
    output = run(tmp_path, "export", "torch", "run", "--out", "x.pth").output
    assert "x.pth: 0.2 MB, for MiniMind v2, before March 2026" in output
    assert "x.json: the arguments of its MiniMindConfig" in output
    return tmp_path


def test_there_and_back(folder: Path) -> None:
    output = run(folder, "import", "x.pth", "--out", "new", "--tokenizer", "run/model").output
    assert "MiniMind v2: 37,792 parameters in float32" in output
    assert "max_position_embeddings │ 256    │ x.json" in output
    assert re.search(r"Try it: \S*minimind chat new", output)
    before, after = folder / "run" / "model", folder / "new"
    for file in before.iterdir():
        assert file.read_bytes() == (after / file.name).read_bytes(), file


def test_settings_and_the_tokenizer_beside_the_file(folder: Path) -> None:
    (folder / "x.json").unlink()
    Tokenizer.load(folder / "run" / "model").save(folder)
    arguments = ("x.pth", "num_attention_heads=4", "rope_theta=5e4", "--out", "new")
    output = " ".join(run(folder, "import", *arguments).output.split())
    assert "num_attention_heads │ 4 │ given" in output
    assert "rope_theta │ 50,000 │ given" in output
    assert "rms_norm_eps │ 1e-05 │ default of MiniMind v2" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x.pth",), "has no tokenizer.json; give MiniMind's tokenizer"),
        (("none.pth", "--tokenizer", "run/model"), "none.pth: there is no such file; give a .pth"),
        (("x.json", "--tokenizer", "run/model"), "x.json: cannot be read as a file of torch.save"),
        (("x.pth", "heads=4", "--tokenizer", "run/model"), "no setting 'heads'; known are"),
        (("x.pth", "heads", "--tokenizer", "run/model"), "'heads' is not of the form KEY=VALUE"),
        (("x.pth", "--tokenizer", "run"), "run"),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str, folder: Path) -> None:
    output = run(folder, "import", *arguments, "--out", "new", status=1).output
    assert message in output and "Traceback" not in output
    assert not (folder / "new").exists()


def test_nothing_in_the_target_folder_is_removed(folder: Path) -> None:
    """A folder of MiniMind's weights looks like a model directory: it has a config.json."""
    weights = folder / "weights"
    Tokenizer.load(folder / "run" / "model").save(weights)
    for name in ("config.json", "pretrain.pth"):
        (weights / name).write_text("{}")
    (folder / "x.pth").rename(weights / "x.pth")
    before = {file.name: file.read_bytes() for file in weights.iterdir()}
    error = run(folder, "import", "weights/x.pth", "--out", "weights", status=1).stderr
    message = "already exists and would be overwritten; give another --out, or move it away first"
    assert error == f"error: weights {message}\n"
    error = run(weights, "import", "x.pth", "--out", ".", status=1).stderr
    assert error == "error: . is the current folder, which cannot be replaced; give another --out\n"
    assert {file.name: file.read_bytes() for file in weights.iterdir()} == before
