"""Open WebUI as a client, installed into a temporary environment of 3 GB."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch

from tests.support.services import Process, serving, wait_until

_VERSION = "0.12.4"
_PYTHONS = ((3, 11), (3, 12))  # supported by this version
KEY = "a-key"
# Offline, and without its built-in models.
_ENVIRONMENT = {
    "OFFLINE_MODE": "true",
    "HF_HUB_OFFLINE": "1",
    "WEBUI_AUTH": "false",
    "ENABLE_OLLAMA_API": "false",
    "RAG_EMBEDDING_ENGINE": "openai",
    "AUDIO_STT_ENGINE": "openai",
    "ANONYMIZED_TELEMETRY": "false",
    "OPENAI_API_KEY": KEY,
    # Each would send another request to the model.
    "ENABLE_TITLE_GENERATION": "false",
    "ENABLE_TAGS_GENERATION": "false",
    "ENABLE_FOLLOW_UP_GENERATION": "false",
}


def find_python() -> str | None:
    """Return a supported Python interpreter."""
    if sys.version_info[:2] in _PYTHONS:
        return sys.executable
    return next((p for v in _PYTHONS if (p := shutil.which("python{}.{}".format(*v)))), None)


@pytest.fixture(scope="module")
def open_webui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Install Open WebUI from the package index; yield its program; remove it afterwards."""
    python = find_python()
    if python is None:
        pytest.skip("no Python 3.11 or 3.12 here, which Open-WebUI needs")
    environment = tmp_path_factory.mktemp("open-webui") / "environment"
    try:
        subprocess.run([python, "-m", "venv", environment], check=True)
        # torch first: without a version, pip may choose another build, which is much larger.
        for package in (f"torch=={torch.__version__.partition('+')[0]}", f"open-webui=={_VERSION}"):
            pip = [environment / "bin" / "pip", "install", "--quiet", "--no-cache-dir", package]
            done = subprocess.run(pip, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"{package} cannot be installed here: {done.stderr[-300:]}")
        yield environment / "bin" / "open-webui"
    finally:
        shutil.rmtree(environment, ignore_errors=True)


@contextlib.contextmanager
def running(program: Path, service: Process, folder: Path) -> Iterator[str]:
    """Run Open WebUI; yield its URL once it is healthy."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    own = {
        "DATA_DIR": str(folder / "data"),
        "WEBUI_SECRET_KEY": "for this test",
        "OPENAI_API_BASE_URL": f"{service.url}/v1",
    }

    def is_healthy() -> bool:
        assert child.poll() is None, (folder / "log").read_text()[-3000:]
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/health").status_code == 200
        return False

    (folder / "data").mkdir()
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            [program, "serve", "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=log,
            cwd=folder,
            env=os.environ | _ENVIRONMENT | own,
        ) as child,
    ):
        try:
            wait_until(is_healthy, seconds=180)
            yield url
        finally:
            child.terminate()
            try:
                child.wait(timeout=20)
            finally:
                child.kill()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_open_webui_lists_models_and_chats_and_streams(
    open_webui: Path, models_dir: Path, tmp_path: Path
) -> None:
    log = tmp_path / "service.log"
    with (
        serving(models_dir, log, MINIMIND_API_KEY=KEY) as service,
        running(open_webui, service, tmp_path) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        check_chats(client, service)
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    statuses = {(r["route"], r["status"]) for r in requests if r["event"] == "request"}
    assert ("/v1/chat/completions", 200) in statuses
    assert all(status == 200 for _, status in statuses)


def check_chats(client: Any, service: Process) -> None:
    """Compare answers through Open WebUI with those of the service."""
    signed_in = client.post("/api/v1/auths/signin", json={"email": "", "password": ""})
    client.headers["authorization"] = f"Bearer {signed_in.json()['token']}"
    listed = client.get("/api/models").json()["data"]
    assert {"tiny", "other"} <= {model["id"] for model in listed}
    request = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "长江有多长？"}],
        "temperature": 0,
        "max_tokens": 20,
    }
    headers = {"authorization": f"Bearer {KEY}"}
    url = f"{service.url}/v1/chat/completions"
    expected = httpx.post(url, json=request, headers=headers).json()["choices"][0]
    complete = client.post("/api/chat/completions", json=request | {"stream": False}).json()
    assert complete["choices"][0]["message"]["content"] == expected["message"]["content"]
    assert complete["choices"][0]["finish_reason"] == expected["finish_reason"]
    assert complete["usage"]["completion_tokens"] == 20
    pieces: list[str] = []
    reasons = set()
    with client.stream("POST", "/api/chat/completions", json=request | {"stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    pieces.append(choice["delta"].get("content") or "")
                    reasons.add(choice["finish_reason"])
            elif line:
                assert line == "data: [DONE]"
    assert "".join(pieces) == expected["message"]["content"]
    assert len([piece for piece in pieces if piece]) > 3
    assert reasons == {None, "length"}
