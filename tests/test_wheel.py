"""The wheel, installed in an environment that sees the dependencies but not the checkout."""

import json
import os
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = "Scripts" if sys.platform == "win32" else "bin"
TINY = (
    *("model.preset=nano", "data.seq_len=32", "training.steps=2", "training.global_batch_size=4"),
    *("validation.num_sequences=4", "data.store=stores"),
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel; a .pth file adds the packages of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "-w", str(folder)]
    built = subprocess.run(command, capture_output=True, text=True)
    if "No matching distribution found for hatchling" in built.stdout + built.stderr:
        pytest.skip("pip cannot download the build backend here")
    assert built.returncode == 0, built.stderr
    [wheel] = folder.glob("minimind-*.whl")
    # With pip of this environment: the new one stays empty, and needs no ensurepip.
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / BIN / "python"
    find = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.check_output([python, "-c", find], text=True).strip())
    lines = "\n".join(path for path in site.getsitepackages() if Path(path).is_dir())
    (packages / "dependencies.pth").write_text(lines, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    subprocess.run([*command, "--no-index", str(wheel)], check=True, capture_output=True)
    return folder / "venv" / BIN


def run(environment: Path, folder: Path, *arguments: object) -> str:
    """Run the installed `minimind` in `folder` without the checkout on its path."""
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [environment / "minimind", *map(str, arguments)],
        cwd=folder,
        env=own | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_package_is_imported_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [environment / "python", "-c", "import minimind; print(minimind.__file__)"]
    imported = subprocess.check_output(command, cwd=tmp_path, env=own, text=True).strip()
    assert Path(imported).is_relative_to(environment.parent)


def test_first_steps_and_self_test(environment: Path, tmp_path: Path) -> None:
    assert run(environment, tmp_path, "--version").startswith("minimind ")
    assert "minimind demo" in run(environment, tmp_path)
    assert "Everything works" in run(environment, tmp_path, "doctor", "--device", "cpu")


def test_packaged_recipes_textbook_and_templates(environment: Path, tmp_path: Path) -> None:
    """Train from packaged recipes and data, write a report and chat: no file is missing."""
    with (tmp_path / "texts.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(200):
            stream.write(json.dumps({"text": f"长江第{number}段长{7 * number}公里。"}) + "\n")
    run(environment, tmp_path, "tokenizer", "train", "texts.jsonl", "--out", "tokenizer")
    data = ("--data", "texts.jsonl", "--tokenizer", "tokenizer", "--device", "cpu")
    run(environment, tmp_path, "pretrain", *TINY, *data, "--out", "base")
    name = ("data.variables.name=小明", "data.variables.author=小红", "lora.rank=2")
    lora = [setting for setting in TINY if not setting.startswith("model.")]
    run(
        environment,
        tmp_path,
        *("lora", "lora-identity", "--model", "base", *lora, *name, "--device", "cpu"),
        *("--out", "adapter"),
    )
    run(environment, tmp_path, "report", "base", "adapter", "--out", "both.html")
    assert "</html>" in (tmp_path / "both.html").read_text("utf-8")
    run(environment, tmp_path, "generate", "base", "长江", "--max-new-tokens", 4)
