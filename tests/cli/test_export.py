"""`minimind export`: files, messages and bad input. For the content of files see tests/export."""

import contextlib
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from minimind.cli.main import app
from minimind.config.settings import LoRASettings
from minimind.model import apply_lora, load_model, save_adapter
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
    """A folder with a model in the run directory `run`, and an adapter of it in `lora`."""
    save_small_model(tmp_path / "run" / "model", "llama", tokenizer)
    model = apply_lora(load_model(tmp_path / "run" / "model"), LoRASettings())
    save_adapter(tmp_path / "lora" / "adapter", model, LoRASettings(), tmp_path / "run" / "model")
    (tmp_path / "taken.gguf").write_text("mine")
    return tmp_path


def test_gguf_takes_the_name_of_the_run(folder: Path) -> None:
    output = run(folder, "gguf", "run/model").output
    assert (folder / "run-f16.gguf").is_file()
    assert "run-f16.gguf: 0." in output and "llama-cli -m run-f16.gguf" in output
    output = run(folder, "gguf", "run", "--adapter", "lora", "--adapter-only").output
    assert "llama-cli -m run-f16.gguf --lora lora-lora-f16.gguf" in output
    run(folder, "gguf", "run", "--adapter", "lora", "--out", "new/merged.gguf", "--type", "Q8_0")
    assert (folder / "new" / "merged.gguf").is_file()


def test_ollama_writes_a_modelfile(folder: Path) -> None:
    (folder / "run").rename(folder / "my 小模型 2")
    output = run(folder, "ollama", "my 小模型 2", "--type", "q8_0", "--out", "for ollama").output
    assert "ollama create my-2 -f 'for ollama/Modelfile' && ollama run my-2" in output
    modelfile = (folder / "for ollama" / "Modelfile").read_text("utf-8")
    assert modelfile.startswith("FROM ./my-2-q8_0.gguf\nTEMPLATE")
    assert (folder / "for ollama" / "my-2-q8_0.gguf").is_file()


def test_tensors_in_another_type_are_reported(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_small_model(tmp_path / "run", "llama", tokenizer, hidden_size=48)
    output = run(tmp_path, "gguf", "run", "--type", "q4_0").output
    assert "11 tensors could not be stored as q4_0, which needs rows of a multiple of 32" in output
    assert "numbers, and became f16" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gguf", "nowhere"), "nowhere: there is no such directory"),
        (("gguf", "lora"), "lora holds a LoRA adapter but no model: merge it into its base model"),
        (("gguf", "run", "--type", "q9"), "unknown GGUF type 'q9'; known: f32, f16"),
        (("gguf", "run", "--adapter-only"), "--adapter-only needs --adapter DIR"),
        (("gguf", "run", "--adapter", "run"), "is not a LoRA adapter"),
        (
            ("gguf", "run", "--adapter", "lora", "--adapter-only", "--type", "q8_0"),
            "adapters are not quantized: use --type f32, f16, bf16",
        ),
        (("gguf", "run", "--out", "taken.gguf"), "taken.gguf already exists; delete it"),
        (("gguf", "run", "--out", "run"), "run is a directory; give a file name"),
        (("gguf", "run", "--out", "run.bin"), "run.bin: the name of a GGUF file ends in .gguf"),
        (("ollama", "run", "--out", "taken.gguf"), "taken.gguf"),
        (("web", "run", "--out", "run"), "run already exists and holds no exported page"),
        (("web", "run", "--out", "w", "--type", "q9"), "unknown GGUF type 'q9'"),
        (("web", "run", "--out", "w", "--wllama", "run/model/config.json"), "is not wllama"),
        (("web", "run", "--out", "w", "--wllama", "none.tgz"), "none.tgz"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], message: str, folder: Path) -> None:
    output = run(folder, *arguments, status=1).output
    assert message in output and "Traceback" not in output
    names = sorted(path.name for path in folder.iterdir() if path.name != "cache")
    assert names == ["lora", "run", "taken.gguf"]
    assert (folder / "taken.gguf").read_text() == "mine"


def test_k_quants_without_llama_cpp(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    output = run(folder, "gguf", "run", "--type", "Q4_K_M", status=1).output
    assert "the type q4_k_m needs llama-cpp-python, which is not installed: pip install" in output
    assert "llama-cpp]" in output and "Without it: f32, f16, bf16, q8_0, q4_0" in output
