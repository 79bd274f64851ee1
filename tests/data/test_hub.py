"""Downloads with the real client from a local server in place of the Hub."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from minimind.data.hub import PUBLISHED, download
from minimind.errors import UsageError

pytest.importorskip("huggingface_hub")
CONTENT = b"PK the archive" * 100
FILES = {f"/datasets/{p.repository}/resolve/{p.revision}/{p.file}" for p in PUBLISHED.values()}


class _Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        exists = self.path in FILES
        self.send_response(200 if exists else 404)
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{"b" * 40}"')
        self.send_header("Content-Length", str(len(CONTENT) if exists else 0))
        self.end_headers()
        if body and exists:
            self.wfile.write(CONTENT)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def get(folder: Path, endpoint: str, *names: str) -> subprocess.CompletedProcess[str]:
    """Run `data get` in a new process: the client reads HF_ENDPOINT when it is imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    kept |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-m", "minimind", "data", "get", *names, "--out", str(folder / "data")],
        capture_output=True,
        text=True,
        env=kept,
        timeout=120,
    )


def test_published_files_are_downloaded_once(hub: str, tmp_path: Path) -> None:
    done = get(tmp_path, hub, *PUBLISHED)
    assert done.returncode == 0, done.stderr
    for name, published in PUBLISHED.items():
        assert (tmp_path / "data" / published.name).read_bytes() == CONTENT
        assert f"{name}: " in done.stdout
    assert done.stdout.count("the latest version, not a pinned one") == 1, "of cmmlu"
    (tmp_path / "data" / "ceval-exam.zip").write_bytes(b"mine")
    assert download("ceval", tmp_path / "data").read_bytes() == b"mine"


def test_a_file_missing_from_the_hub_is_an_error(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "FILES", set())
    done = get(tmp_path, hub, "cmmlu")
    assert done.returncode == 1
    assert "cmmlu: the download failed (" in done.stderr
    assert "404 Not Found" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow  # the client retries for half a minute
def test_without_a_network_the_error_gives_the_address(tmp_path: Path) -> None:
    done = get(tmp_path, "http://127.0.0.1:9", "ceval")
    assert done.returncode == 1
    assert "ceval: the download failed" in done.stderr
    assert PUBLISHED["ceval"].url in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="available are ceval, cmmlu"):
        download("chess", tmp_path)
