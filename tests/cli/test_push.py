"""`minimind push` against stand-ins of both hubs."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minimind.cli.main import app
from minimind.tokenizer import Tokenizer
from tests.support.commands import fast_python
from tests.support.hub_upload_server import TOKEN, UploadServer, upload_server
from tests.support.run_folders import write_run
from tests.support.small_models import save_small_model

DATA = '[data]\nsources = [{path = "cmmlu"}]\n'


@pytest.fixture
def run_folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    run = write_run(tmp_path / "chat", objective="sft", more=DATA)
    save_small_model(run / "model", "llama", tokenizer)
    (run / "model" / ".hidden").write_text("not published")
    return run


@pytest.fixture
def server() -> Iterator[UploadServer]:
    with upload_server() as server:
        yield server


def push(
    server: UploadServer, folder: Path, *arguments: str, status: int = 0, token: str = TOKEN
) -> str:
    """Run the command in a process: both clients read their settings when they are imported."""
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": token,
        "HF_HOME": str(folder.parent / "hf"),
        "MODELSCOPE_ENDPOINT": server.url,
        "MODELSCOPE_API_TOKEN": token,
        "MODELSCOPE_CACHE": str(folder.parent / "modelscope"),
    }
    done = subprocess.run(
        [*fast_python(), "-m", "minimind", "push", str(folder), "alice/tiny", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    output = done.stdout + done.stderr
    assert done.returncode == status, output
    assert "Traceback" not in output
    return output


def published(run: Path) -> dict[str, bytes]:
    """Return the files that a hub must have, without the model card and its plots."""
    files = (run / "model").iterdir()
    return {file.name: file.read_bytes() for file in files if not file.name.startswith(".")}


@pytest.mark.parametrize("hub", ["hf", "modelscope"])
def test_model_and_card_arrive(server: UploadServer, run_folder: Path, hub: str) -> None:
    output = push(server, run_folder, "--yes", "--private", "--license", "mit", "--hub", hub)
    assert "cmmlu:v1_0_1: cc-by-nc-4.0 forbids commercial use" in output
    assert f"Published: {server.url}" in output
    files = dict(server.committed[f"{hub}/alice/tiny"])
    card = files.pop("README.md").decode()
    assert "\nlicense: mit\n" in card and "alice/tiny" in card
    plots = [name for name in files if name.startswith("plots/")]
    assert plots and all(f"]({name})" in card for name in plots)
    assert {name: data for name, data in files.items() if name not in plots} == published(
        run_folder
    )
    created = server.repositories[f"{hub}/alice/tiny"]
    if hub == "hf":
        assert created["visibility"] == "private"
    else:
        assert (created["Visibility"], created["License"]) == (1, "mit")
    assert not list(run_folder.glob(".push-*"))


def test_a_refusal_names_the_remedy(server: UploadServer, run_folder: Path) -> None:
    output = push(server, run_folder, "--yes", status=1, token="wrong")
    assert "the access token is not valid; set HF_TOKEN" in output
    assert not server.committed


def test_nothing_is_sent_without_confirmation(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["push", str(run_folder), *arguments])
        assert done.exit_code == 1, done.output
        return done.output

    assert "add --yes, or --preview DIR" in run("alice/tiny")
    for name in (
        "tiny",
        "alice/tiny/more",
        "alice/..",
        "小明/tiny",
        "alice/tiny.git",
        "alice/tiny-",
    ):
        assert "is not the name of a repository" in run(name, "--yes")
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    assert "set MODELSCOPE_API_TOKEN" in run(
        "alice/tiny", "--yes", "--hub", "modelscope", "--license", "mit"
    )


def test_damaged_weights_are_not_published(run_folder: Path, tmp_path: Path) -> None:
    os.truncate(run_folder / "model" / "model.safetensors", 1000)
    for more in (["--yes"], ["--preview", str(tmp_path / "card")]):
        done = CliRunner().invoke(app, ["push", str(run_folder), "alice/tiny", *more])
        assert done.exit_code == 1
        assert "model.safetensors: cannot be read as safetensors" in done.output
    assert not (tmp_path / "card").exists()


def test_preview_writes_the_card_only(run_folder: Path, tmp_path: Path) -> None:
    arguments = ["push", str(run_folder), "alice/tiny", "--preview", str(tmp_path / "card")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and "Nothing was sent." in done.output
    assert (tmp_path / "card" / "README.md").is_file()
    assert list((tmp_path / "card" / "plots").glob("*.svg"))
    (tmp_path / "card" / "README.md").write_text("mine", "utf-8")
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1 and "README.md already exists; delete it or choose" in done.output
    assert (tmp_path / "card" / "README.md").read_text("utf-8") == "mine"
