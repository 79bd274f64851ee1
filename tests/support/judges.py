"""Judges to ask: small services that speak OpenAI's API, in a thread of the test's own process."""

import json
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Say = Callable[[list[dict[str, str]]], str]


def shown_answers(messages: Sequence[dict[str, str]]) -> list[str]:
    """What the judge is to judge."""
    parts = messages[-1]["content"].split("[answer ")[1:]
    return [part.split("]\n", 1)[1].split("\n[end of answer")[0] for part in parts]


def longer_is_better(messages: Sequence[dict[str, str]]) -> str:
    scores = [min(len(answer), 100) for answer in shown_answers(messages)]
    reason = "The longer, the better."
    return json.dumps({"reason": reason} | dict(zip("AB", scores, strict=False)))


class Judge:
    """Enter it to start it. asked: what it was sent; keys: the keys that came with it."""

    def __init__(self, say: Say, name: str = "judge") -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._send("application/json", json.dumps({"data": [{"id": name}]}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                judge.asked.append(body)
                judge.keys.append(self.headers.get("authorization"))
                try:
                    said = say(body["messages"])
                except RuntimeError as error:
                    self._send(
                        "application/json", json.dumps({"error": {"message": str(error)}}), 500
                    )
                    return
                delta = {"choices": [{"delta": {"content": said}, "finish_reason": "stop"}]}
                self._send("text/event-stream", f"data: {json.dumps(delta)}\n\ndata: [DONE]\n\n")

            def _send(self, kind: str, text: str, status: int = 200) -> None:
                content = text.encode()
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> "Judge":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
