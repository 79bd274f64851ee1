"""`minimind export`: files, messages and refusals. What the files hold: tests/export."""

import contextlib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from minimind.cli.main import app
from minimind.tokenizer import Tokenizer
from tests.support.small_models import save_small_model


def run(folder: Path, *arguments: object, status: int = 0) -> Result:
    with contextlib.chdir(folder):
        done = CliRunner().invoke(
            app, ["export", *map(str, arguments)], env={"COLUMNS": "200", "MINIMIND_CACHE": "cache"}
        )
    assert done.exit_code == status, done.output
    return done


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A folder with a model in the run directory `run`."""
    save_small_model(tmp_path / "run" / "model", "llama", tokenizer)
    return tmp_path


def test_gguf_takes_the_name_of_the_run(folder: Path) -> None:
    output = run(folder, "gguf", "run").output
    assert (folder / "run-f16.gguf").is_file()
    assert "run-f16.gguf: 0." in output and "llama-cli -m run-f16.gguf" in output


def test_ollama_writes_a_modelfile(folder: Path) -> None:
    output = run(folder, "ollama", "run/model", "--type", "q8_0", "--out", "for ollama").output
    assert "ollama create run -f 'for ollama/Modelfile'" in output
    modelfile = (folder / "for ollama" / "Modelfile").read_text("utf-8")
    assert modelfile.startswith("FROM ./run-q8_0.gguf\nTEMPLATE")
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n' in modelfile
    assert (folder / "for ollama" / "run-q8_0.gguf").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gguf", "nowhere"), "nowhere: there is no such directory"),
        (("gguf", "run", "--type", "q9"), "no GGUF type 'q9'; known are f32, f16"),
        (("gguf", "run", "--adapter-only"), "--adapter-only needs --adapter DIR"),
        (("gguf", "run", "--adapter", "run"), "is not a LoRA adapter"),
        (("web", "run", "--out", "run"), "run is not empty and holds no page"),
        (("web", "run", "--out", "w", "--wllama", "run/model/config.json"), "is not wllama"),
        (("web", "run", "--out", "w", "--wllama", "none.tgz"), "none.tgz"),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str, folder: Path) -> None:
    output = run(folder, *arguments, status=1).output
    assert message in output and "Traceback" not in output
    assert not list(folder.glob("*.gguf")) and not (folder / "w").exists()
