"""Uploads to a stand-in of ModelScope; for Hugging Face see tests/cli/test_push.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from minimind.errors import ServiceError, UsageError
from minimind.export.push import push
from minimind.tokenizer import Tokenizer
from tests.support.hub_upload_server import TOKEN, UploadServer, upload_server
from tests.support.small_models import save_small_model


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[UploadServer]:
    with upload_server() as server:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
        yield server


@pytest.fixture
def model(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save_small_model(tmp_path / "model", "llama", tokenizer)
    return tmp_path / "model"


def upload(model: Path, licence: str | None = "mit") -> str:
    card = {"README.md": "# generated\n"}
    return push(model, card, "alice/tiny", hub="modelscope", licence=licence, private=False)


def test_own_card_has_precedence(server: UploadServer, model: Path) -> None:
    assert upload(model) == f"{server.url}/models/alice/tiny"
    assert server.committed["modelscope/alice/tiny"]["README.md"] == b"# generated\n"
    (model / "README.md").write_text("# mine\n")
    upload(model)
    assert server.committed["modelscope/alice/tiny"]["README.md"] == b"# mine\n"
    assert server.repositories["modelscope/alice/tiny"]["Visibility"] == 5  # public


def test_modelscope_needs_a_licence(server: UploadServer, model: Path) -> None:
    with pytest.raises(UsageError, match="add --license ID"):
        upload(model, None)


def test_refusals_name_the_remedy(
    server: UploadServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.refuse = 403
    with pytest.raises(ServiceError, match="create one with write access"):
        upload(model)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "wrong")
    server.refuse = None
    with pytest.raises(ServiceError, match="not valid; set MODELSCOPE_API_TOKEN"):
        upload(model)
    assert not server.committed and not list(model.parent.glob(".push-*"))
