"""A stand-in for the upload side of the Hugging Face Hub and of ModelScope."""

import base64
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_token-with-write-access"


class UploadServer(ThreadingHTTPServer):
    """Collects commits. refuse: HTTP status of all answers to uploads, None for success."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, Any]] = {}  # "hf/alice/tiny" -> visibility
        self.committed: dict[str, dict[str, bytes]] = {}  # the same -> content by path
        self.blobs: dict[str, bytes] = {}  # by SHA-256
        self.refuse: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def upload_server() -> Iterator[UploadServer]:
    """Run the server in a thread."""
    with UploadServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: UploadServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        parts = urllib.parse.urlsplit(self.path).path.strip("/").split("/")
        if parts[:2] == ["openapi", "v1"] or parts[:2] == ["api", "v1"]:
            name = "/".join(parts[-2:])
            if f"modelscope/{name}" in self.server.repositories:
                self._answer({"Code": 200, "data": {"id": name}, "Data": {"Name": parts[-1]}})
                return
        self._answer({"Code": 10010205001, "Message": "not found"}, 404)

    def do_PUT(self) -> None:
        content = self._body()
        digest = self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(content).hexdigest() == digest
        self.server.blobs[digest] = content
        self._answer({"Code": 200})

    def do_POST(self) -> None:
        path, body = urllib.parse.urlsplit(self.path).path.strip("/"), self._body()
        if self.server.refuse or TOKEN not in str(self.headers):
            self._answer({"error": "refused", "Message": "refused"}, self.server.refuse or 401)
        elif path.endswith("info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif path == "api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path == "api/repos/create":
            request = json.loads(body)
            name = f"hf/{request['organization']}/{request['name']}"
            is_new = name not in self.server.repositories
            self.server.repositories.setdefault(name, request)
            status = 200 if is_new else 409
            self._answer({"url": f"{self.server.url}/{name[3:]}", "name": name[3:]}, status)
        elif path == "api/v1/models":
            request = json.loads(body)
            name = f"modelscope/{request['Path']}/{request['Name']}"
            if name in self.server.repositories:
                self._answer({"Code": 10020101001, "Message": "already exists"}, 409)
            else:
                self.server.repositories[name] = request
                self._answer({"Code": 200, "Data": {"Name": request["Name"]}})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": _mode(file["path"]), "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif path.startswith("api/v1/repos/models/"):
            owner, name = path.split("/")[4:6]
            self._commit_modelscope(f"modelscope/{owner}/{name}", json.loads(body))
        else:
            owner, name = path.split("/")[2:4]
            self._commit_hf(f"hf/{owner}/{name}", body)

    def _batch(self, request: dict[str, Any]) -> None:
        objects = []
        for item in request["objects"]:
            upload = {"href": f"{self.server.url}/blobs/{item['oid']}"}
            known = item["oid"] in self.server.blobs
            objects.append({**item, "actions": {} if known else {"upload": upload}})
        answer = {"transfer": "basic", "objects": objects}
        self._answer(answer | {"Code": 200, "Data": answer})

    def _commit_hf(self, repository: str, body: bytes) -> None:
        committed = self.server.committed.setdefault(repository, {})
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                committed[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                committed[value["path"]] = self.server.blobs[value["oid"]]
        self._answer(
            {
                "commitUrl": f"{self.server.url}/{repository[3:]}/commit/{'0' * 40}",
                "commitOid": "0" * 40,
                "success": True,
            }
        )

    def _commit_modelscope(self, repository: str, request: dict[str, Any]) -> None:
        committed = self.server.committed.setdefault(repository, {})
        for action in request["actions"]:
            is_lfs = action["type"] == "lfs"
            content = (
                self.server.blobs[action["sha256"]]
                if is_lfs
                else base64.b64decode(action["content"])
            )
            committed[action["path"]] = content
        self._answer({"Code": 200, "Success": True, "Data": {"oid": "0" * 40}})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"
