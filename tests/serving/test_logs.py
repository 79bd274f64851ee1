import json
import logging
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx

from minimind.serving.logs import JsonLines
from tests.support.services import serving

SECRET = "秘密secret47"


def test_logs_and_metrics_have_no_text_of_users(models_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(models_dir, log, MINIMIND_API_KEY=f"key-{'secret47'}") as service:
        key = {"authorization": "Bearer key-secret47"}
        messages = [{"role": "user", "content": SECRET}]
        good = {"model": "tiny", "messages": messages, "max_tokens": 3}
        with httpx.Client(base_url=service.url, headers=key) as client:
            for body in (
                good,
                good | {"stream": True},
                good | {SECRET: 1},
                good | {"temperature": SECRET},
                good | {"model": SECRET},
                {"model": "tiny", "messages": [{"role": SECRET, "content": SECRET}]},
            ):
                client.post("/v1/chat/completions", json=body)
            client.post("/v1/completions", json={"model": "tiny", "prompt": SECRET, "user": SECRET})
            client.post("/v1/chat/completions", content=SECRET.encode())
            client.get(f"/v1/models/{SECRET}")
            client.get(f"/{SECRET}?{SECRET}=1", headers={"user-agent": "secret47"})
            client.request("SECRET47", "/v1/models")
            client.get("/v1/models", headers={"authorization": "Bearer secret47"})
            metrics = client.get("/metrics").text
        service.end()
    text = log.read_text(encoding="utf-8")
    assert "secret47" not in text.lower()
    assert "secret47" not in metrics.lower()
    lines = [json.loads(line) for line in text.splitlines()]
    assert {line["event"] for line in lines} == {"listening", "request", "stopping", "ended"}
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in requests[1:8]] == [200, 200, 400, 400, 404, 400, 200]
    first = requests[1]
    assert first["route"] == "/v1/chat/completions"
    assert first["completion_tokens"] == 3
    assert first["prompt_tokens"] > 3
    assert first["id"].startswith("req_")
    assert first["model"] == "tiny"


_WARNS = """
import logging, warnings
from minimind.serving.logs import log_to_stderr

log_to_stderr()
warnings.warn("CUDA graphs do not work here\\nmore", stacklevel=1)
logging.getLogger("some.package").warning("careful: %s", "hot")
"""


def test_warnings_are_json_lines_too() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", _WARNS], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    warned, other = (json.loads(line) for line in done.stderr.splitlines())
    assert (warned["event"], warned["level"], warned["kind"]) == (
        "warning",
        "warning",
        "UserWarning",
    )
    assert warned["message"] == "CUDA graphs do not work here\nmore"
    assert warned["at"].endswith("<string>:6")
    assert (other["event"], other["level"]) == ("careful: hot", "warning")


def test_exceptions_are_logged_without_their_message() -> None:
    try:
        raise ValueError(f"bad: {SECRET}")
    except ValueError as error:
        record = logging.LogRecord("a", 40, "a.py", 1, "failed", (), (type(error), error, None))
    line = json.loads(JsonLines().format(record))
    assert (line["event"], line["level"], line["exception"]) == ("failed", "error", "ValueError")
    [location] = line["at"]
    assert location.endswith("test_exceptions_are_logged_without_their_message")
    assert "secret47" not in json.dumps(line)
