"""Models whose chat template rejects some conversations."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from minimind.model import save_model
from minimind.serving.limits import Limits
from minimind.tokenizer import Tokenizer
from tests.support.services import InProcess, make_model


@pytest.fixture(scope="module")
def service_of(
    foreign_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], InProcess]]:
    """Return the running service of a model by the kind of its foreign tokenizer."""
    with contextlib.ExitStack() as services:

        @functools.cache
        def start(shape: str) -> InProcess:
            run = tmp_path_factory.mktemp(shape) / "tiny"
            tokenizer = Tokenizer.load(foreign_dir(shape))
            save_model(run / "model", make_model(tokenizer, 1, 256), tokenizer)
            return services.enter_context(InProcess(run, 2, Limits(), ()))

        yield start


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
    truncation: str | None, shape: str, roles: list[str], message: str, service_of: Any
) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": role, "content": "长江"} for role in roles],
        "truncation": truncation,
    }
    answer = httpx.post(f"{service_of(shape).url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("messages", "invalid_value")
    assert message in error["message"]
