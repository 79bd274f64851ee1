"""Models whose chat template rejects some conversations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from minimind.model import save_model
from minimind.serving.limits import Limits
from minimind.tokenizer import Tokenizer
from tests.conftest import TEXTS
from tests.support.foreign import make_tokenizer
from tests.support.services import InProcess, make_model


@pytest.fixture
def serve_shape(tmp_path: Path) -> Callable[[str], InProcess]:
    def make(shape: str) -> InProcess:
        tokenizer = Tokenizer.load(make_tokenizer(shape, tmp_path / "tokenizer", TEXTS))
        save_model(tmp_path / "tiny" / "model", make_model(tokenizer, 1, 256), tokenizer)
        return InProcess(tmp_path / "tiny", 2, Limits(), ())

    return make


@pytest.mark.parametrize("truncation", [None, "disabled", "auto"])
@pytest.mark.parametrize(
    ("shape", "roles", "message"),
    [
        ("llama2", ["system", "user"], "must alternate"),
        ("llama2", ["user", "user"], "must alternate"),
        ("base", ["user"], "chat"),
    ],
)
def test_rejection_by_a_template_is_a_client_error(
    truncation: str | None, shape: str, roles: list[str], message: str, serve_shape: Any
) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": role, "content": "长江"} for role in roles],
        "truncation": truncation,
    }
    with serve_shape(shape) as service:
        answer = httpx.post(f"{service.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("messages", "invalid_value")
    assert message in error["message"]
