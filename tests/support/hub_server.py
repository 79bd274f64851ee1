"""A stand-in for the Hugging Face Hub and ModelScope, with faults, on a local HTTP server."""

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c0ffee" + "0" * 34
_DRIP_S = 0.005


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class HubServer(ThreadingHTTPServer):
    """Repositories of both hubs under one address.

    files: content by (hub, kind, repository, path). faults: by path, what happens to the next
    downloads of a file, in order: "cut:N" closes the connection after N bytes, "stall:N" stops
    sending, "drip" sends a few bytes at a time, "corrupt" changes a byte, "no-range" ignores the
    range, "wrong-range" sends another one, a number is an HTTP status, and a URL a redirect.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[tuple[str, str, str, str], bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []  # (path, headers)
        self.commit = COMMIT
        self.stopped = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(
        self, repository: str, path: str, content: bytes, hub: str = "hf", kind: str = "datasets"
    ) -> None:
        self.files[hub, kind, repository, path] = content

    def downloads(self) -> list[str]:
        """Return the ranges of all downloads of files so far; "" for a whole file."""
        return [
            headers.get("range", "")
            for path, headers in self.requests
            if "/resolve/" in path or "FilePath=" in path
        ]


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append((self.path, headers))
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        parts = urllib.parse.unquote(url.path).strip("/").split("/")
        if parts[:2] == ["api", "v1"]:
            self._modelscope(parts[2:], query)
        elif parts[0] == "api":
            self._hugging_face(parts[1:])
        else:
            kind = "datasets" if parts[0] == "datasets" else "models"
            owner, name, _, revision, *path = parts[1:] if kind == "datasets" else parts
            known = revision in (self.server.commit, "main")
            self._file(("hf", kind, f"{owner}/{name}", "/".join(path)), known)

    def _listed(self, hub: str, kind: str, repository: str) -> dict[str, bytes]:
        return {
            key[3]: content
            for key, content in self.server.files.items()
            if key[:3] == (hub, kind, repository)
        }

    def _hugging_face(self, parts: list[str]) -> None:
        kind, owner, name, what, revision, *_ = [*parts, ""]
        files = self._listed("hf", kind, f"{owner}/{name}")
        if fault := self._next_fault(f"{owner}/{name}"):
            self._fail(fault)
        elif not files:
            self._fail("401")  # as the real one answers for a repository that does not exist
        elif what == "commits":
            self._json([{"id": self.server.commit, "title": "one"}])
        elif revision not in (self.server.commit, "main"):
            self._fail("404")
        else:
            siblings = [self._sibling(path, content) for path, content in files.items()]
            card = {"license": "mit"}
            self._json({"sha": self.server.commit, "siblings": siblings, "cardData": card})

    def _sibling(self, path: str, content: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": blob}
        if not path.endswith(".json"):  # small text files are no LFS files
            entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
        return entry

    def _modelscope(self, parts: list[str], query: dict[str, str]) -> None:
        kind, owner, name, *rest = parts
        repository = f"{owner}/{name}"
        files = self._listed("modelscope", kind, repository)
        if fault := self._next_fault(repository):
            self._fail(fault)
        elif not files:
            self._fail("404")
        elif "FilePath" in query:
            self._file(("modelscope", kind, repository, query["FilePath"]), True)
        elif not rest:
            self._json({"Code": 200, "Data": {"License": "Apache License 2.0"}})
        else:
            start = (int(query["PageNumber"]) - 1) * int(query["PageSize"])
            page = list(files.items())[start : start + int(query["PageSize"])]
            entries = [
                {"Path": path, "Type": "blob", "Size": len(content), "Sha256": sha256(content)}
                for path, content in page
            ]
            entries.append({"Path": "folder", "Type": "tree"})
            self._json({"Code": 200, "Data": {"Files": entries[: int(query["PageSize"])]}})

    def _next_fault(self, key: str) -> str | None:
        faults = self.server.faults.get(key)
        return faults.pop(0) if faults else None

    def _file(self, key: tuple[str, str, str, str], known_revision: bool) -> None:
        content = self.server.files.get(key)
        if content is None or not known_revision:
            self._fail("404")
            return
        fault, _, number = (self._next_fault(key[3]) or "").partition(":")
        if fault.isdigit() or fault == "http":
            self._fail(fault if fault.isdigit() else f"{fault}:{number}")
            return
        start = self._start(fault)
        if start > 0 and start >= len(content):
            self._fail("416")
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{sha256(content)}"')
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if fault == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        self._send(content[start:], fault, int(number or 0))

    def _start(self, fault: str) -> int:
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        return {"no-range": 0, "wrong-range": start + 1}.get(fault, start)

    def _send(self, body: bytes, fault: str, number: int) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if fault == "cut":
                self.wfile.write(body[:number])
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            elif fault == "stall":
                self.wfile.write(body[:number])
                self.wfile.flush()
                self.close_connection = True
                self.server.stopped.wait(10)
            elif fault == "drip":
                for position in range(0, len(body), max(1, len(body) // 20)):
                    self.wfile.write(body[position : position + max(1, len(body) // 20)])
                    time.sleep(_DRIP_S)
            else:
                self.wfile.write(body)

    def _fail(self, fault: str) -> None:
        if fault == "html":
            self._respond(200, b"<html>Log in</html>")
        elif fault.isdigit():
            self._respond(int(fault), b"{}", {"Retry-After": "0"})
        else:
            self._respond(302, b"", {"Location": fault})

    def _json(self, content: Any) -> None:
        self._respond(200, json.dumps(content).encode())

    def _respond(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def run_hub_server() -> Iterator[HubServer]:
    """Run a stand-in until the end of the `with` block."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        thread.join()
        server.server_close()


def hub_environment(server: HubServer) -> dict[str, str]:
    """Return the environment of a process that uses the stand-in; no other hub variables."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MODELSCOPE_"))}
    own = {"HF_ENDPOINT": server.url, "MODELSCOPE_ENDPOINT": server.url, "NO_PROXY": "127.0.0.1"}
    return kept | own
