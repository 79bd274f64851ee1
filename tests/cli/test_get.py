"""`minimind get MODEL` from a stand-in of the hubs."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner, Result

from minimind.cli.main import app
from minimind.model import load_model, save_model
from minimind.tokenizer import Tokenizer
from tests.support.hub_server import COMMIT, HubServer, hub_environment, run_hub_server
from tests.support.tiny import make_tiny

MODEL = "owner/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minimind.data.download._BACKOFF_S", 0.001)
    with run_hub_server() as server:
        for name, value in hub_environment(server).items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def published(hub: HubServer, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A model directory that both hubs publish, with files that are not downloaded."""
    directory = tmp_path / "original"
    save_model(directory, make_tiny(), tokenizer)
    for on in ("hf", "modelscope"):
        for file in directory.iterdir():
            hub.add(MODEL, file.name, file.read_bytes(), on, "models")
        hub.add(MODEL, "pytorch_model.bin", b"pickle", on, "models")
        hub.add(MODEL, "onnx/model.onnx", b"onnx", on, "models")
        hub.add(MODEL, "modeling_tiny.py", b"import os", on, "models")
    return directory


def get(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["get", *arguments])


@pytest.mark.parametrize("name", [MODEL, f"modelscope:{MODEL}"])
def test_a_model_is_downloaded_and_loads(hub: HubServer, published: Path, name: str) -> None:
    hub.faults["model.safetensors"] = ["cut:1000", "corrupt"]
    done = get(name, "--yes")
    assert done.exit_code == 0, done.output
    assert "licence: mit" in done.output or "licence: Apache License 2.0" in done.output
    target = Path("models/tiny")
    names = {path.name for path in target.iterdir()}
    assert names == {path.name for path in published.iterdir()} | {"origin.json"}
    for path in published.iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes()
    load_model(target)
    origin = json.loads((target / "origin.json").read_text("utf-8"))
    assert origin["revision"] == ("master" if ":" in name else COMMIT)
    hub.requests.clear()
    assert f"{name} is already in models/tiny" in get(name).output
    assert hub.requests == []
    assert (
        "models/tiny exists and is not this model"
        in get("owner/other", "--out", str(target)).stderr
    )


def test_an_interrupted_download_is_continued(hub: HubServer, published: Path) -> None:
    hub.faults["model.safetensors"] = ["cut:1000", *["cut:0"] * 4]
    failed = get(MODEL, "--yes", "--revision", COMMIT, "--out", "m")
    assert (
        "What is downloaded so far is kept in m.part; the same command continues" in failed.stderr
    )
    assert not Path("m").exists()
    hub.requests.clear()
    assert get(MODEL, "--yes", "--revision", COMMIT, "--out", "m").exit_code == 0
    assert hub.downloads() == ["bytes=1000-"]
    assert not Path("m.part").exists()


@pytest.mark.parametrize("other", ["other/tiny", "modelscope:other/tiny", MODEL])
def test_files_of_another_model_or_version_are_not_mixed_in(
    hub: HubServer, published: Path, other: str
) -> None:
    hub.add(MODEL, "merges.txt", b"of the first only", kind="models")
    hub.faults["model.safetensors"] = ["cut:1000", *["cut:0"] * 4]
    assert get(MODEL, "--yes", "--revision", COMMIT).exit_code == 1
    unfinished = Path("models/tiny.part")
    kept = {path.name for path in unfinished.iterdir() if not path.name.startswith(".")}
    assert {"config.json", "tokenizer.json", "merges.txt"} < kept

    name, at = other.rpartition(":")[2], "modelscope" if ":" in other else "hf"
    hub.files = {key: content for key, content in hub.files.items() if key[3] != "merges.txt"}
    hub.commit = "beef" * 10
    contents = {path.name: path.read_bytes() for path in published.iterdir()}
    contents["config.json"] = contents["config.json"].replace(b"silu", b"gelu")  # of equal size
    contents["model.safetensors"] = contents["model.safetensors"][::-1]
    for file, content in contents.items():
        hub.add(name, file, content, at, "models")
    done = get(other, "--yes")
    assert done.exit_code == 0, done.output
    assert "config.json in models/tiny.part is of another version; downloading it again" in (
        done.output
    )
    assert "removing files of another model or version from models/tiny.part: merges.txt" in (
        done.output.replace("\n", " ")
    )
    origin = json.loads(Path("models/tiny/origin.json").read_text("utf-8"))
    assert origin["repository"] == name
    assert set(origin["files"]) == set(contents)
    assert contents == {
        path.name: path.read_bytes()
        for path in Path("models/tiny").iterdir()
        if path.name != "origin.json"
    }
    assert not unfinished.exists()


def test_files_that_no_download_leaves_are_not_removed(published: Path) -> None:
    Path("m.part").mkdir()
    Path("m.part/thesis.docx").touch()
    done = get(MODEL, "--yes", "--out", "m")
    assert done.exit_code == 1
    assert (
        "m.part contains other files, such as thesis.docx; move them, or choose another --out"
        in (done.stderr)
    )
    assert Path("m.part/thesis.docx").exists()


def test_two_downloads_into_one_folder_do_not_mix(published: Path) -> None:
    with FileLock(".m.lock"):
        done = get(MODEL, "--yes", "--out", "m")
    assert done.exit_code == 1
    assert "another process is downloading to m" in done.stderr
    assert not Path("m.part").exists()


def test_models_that_cannot_be_used_are_refused(hub: HubServer) -> None:
    hub.add("owner/pickle", "pytorch_model.bin", b"pickle", kind="models")
    hub.add("owner/pickle", "config.json", b"{}", kind="models")
    hub.add("owner/nothing", "README.md", b"", kind="models")
    hub.add("owner/weights", "model.safetensors", b"", kind="models")
    for name, message in [
        (
            "owner/pickle",
            "its weights are pickle files (pytorch_model.bin), which can run",
        ),
        ("owner/nothing", "it has no safetensors file"),
        ("owner/weights", "it has no config.json, so it is not a model directory"),
        ("owner/missing", "(HTTP 401 Unauthorized). It may not exist"),
        ("modelscope:owner/missing", "does not have owner/missing at master (HTTP 404 Not Found)"),
        ("tiny", "tiny: not the name of a published model; give OWNER/NAME"),
    ]:
        done = get(name, "--yes")
        assert done.exit_code == 1
        assert message in done.stderr, done.stderr
        assert not Path("models").exists()
    assert "add --yes to accept" in get("owner/pickle").stderr


def test_an_unsupported_architecture_is_reported(hub: HubServer) -> None:
    hub.add("owner/bert", "model.safetensors", b"weights", kind="models")
    hub.add("owner/bert", "config.json", b'{"architectures": ["BertModel"]}', kind="models")
    done = get("owner/bert", "--yes")
    assert done.exit_code == 0
    assert "Only `minimind eval` can use it, if transformers is installed" in done.output
