"""Chat speed of a trained model: in the service, in llama.cpp, and in its page in a browser.

    pip install -c constraints.txt -e '.[bench,llama-cpp,test]'
    python -m benchmarks.chat_speed out/night --json FILE

Every program answers the same questions, each in a new conversation: the service and llama.cpp
greedily, the page with its own settings. Tokens per second: tokens of an answer by the time from
the request to its end, in the page by its own statement, which leaves the prompt out; the median
over questions. The page needs Chromium. A program that is not installed is left out, with a note.
"""

import argparse
import contextlib
import functools
import http.server
import json
import re
import socket
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.serving_speed import running
from minimind.data.textbook import DEMO_QUESTIONS
from minimind.export.gguf import export_gguf
from minimind.export.web import export_web
from minimind.model import resolve_model_directory
from tests.support.chromium import HAS_CHROMIUM, NO_CHROMIUM, start_chromium

_TOKENS = 256  # at most, per answer
_PAGE_SECONDS = 120.0
_RATE = re.compile(r"(\d+) tokens · ([\d.]+) tokens/s")

# Of each answer: tokens, tokens per second, seconds to its first token (None if unknown).
Answers = list[tuple[int, float, float | None]]


def service(model: Path, work: Path, threads: int, *options: str) -> Answers:
    """Ask `minimind serve`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "minimind", "serve", str(model), "--device", "cpu"]
    command += ["--port", str(port), *options]
    with running(command, port, threads, work / "log"):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as response:
            name = json.load(response)["data"][0]["id"]
        _ask(port, name, "你好")
        return [_ask(port, name, question) for question in DEMO_QUESTIONS]


def _ask(port: int, model: str, question: str) -> tuple[int, float, float]:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": question}], "temperature": 0}
    body |= {"model": model, "max_tokens": _TOKENS, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    start = time.perf_counter()
    first, tokens = None, 0
    with urllib.request.urlopen(request) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if any(choice["delta"].get("content") for choice in chunk["choices"]):
                first = first or time.perf_counter() - start
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    seconds = time.perf_counter() - start
    return tokens, tokens / seconds, first or seconds


def llama_cpp(file: Path, threads: int) -> Answers:
    """Ask llama.cpp, in this process."""
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def ask(question: str) -> tuple[int, float, None]:
        start = time.perf_counter()
        reply: Any = model.create_chat_completion(
            [{"role": "user", "content": question}], temperature=0, max_tokens=_TOKENS
        )
        tokens = reply["usage"]["completion_tokens"]
        return tokens, tokens / (time.perf_counter() - start), None

    ask("你好")
    return [ask(question) for question in DEMO_QUESTIONS]


@contextlib.contextmanager
def hosted(folder: Path) -> Iterator[str]:
    """Serve a folder; yield its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def page(folder: Path) -> Answers:
    """Ask the exported page in Chromium, in one conversation per question."""
    driver = start_chromium()
    try:
        with hosted(folder) as url:
            return [_ask_page(driver, url, question) for question in ("你好", *DEMO_QUESTIONS)][1:]
    finally:
        driver.quit()


def _ask_page(driver: Any, url: str, question: str) -> tuple[int, float, None]:
    driver.get(url)
    _wait(lambda: driver.find_element("id", "send").is_enabled())
    driver.find_element("id", "input").send_keys(question)
    driver.find_element("id", "send").click()
    notes: list[str] = []

    def rate() -> re.Match[str] | None:
        notes[:] = [each.text for each in driver.find_elements("css selector", ".note")]
        return _RATE.search(" ".join(notes))

    found = _wait(rate)
    return int(found[1]), float(found[2]), None


def _wait(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + _PAGE_SECONDS
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"the page did not answer within {_PAGE_SECONDS:.0f} s")
        time.sleep(0.05)
    return value


def main() -> None:
    """Measure every program, print a table, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, help="model or run directory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        directory = resolve_model_directory(args.model)
        measured: dict[str, Callable[[], Answers]] = {
            "service, bf16": lambda: service(args.model, work, args.threads),
            "service, int8": lambda: service(args.model, work, args.threads, "--int8"),
        }
        for kind in ("f16", "q8_0"):
            file = work / f"{kind}.gguf"
            export_gguf(directory, file, type=kind)
            name = f"llama.cpp, {kind.upper()}"
            measured[name] = functools.partial(llama_cpp, file, args.threads)
        export_web(directory, work / "page", name="model")
        measured["page in Chromium, Q8_0"] = lambda: page(work / "page")
        for name, measure in measured.items():
            if name.startswith("page") and not HAS_CHROMIUM:
                print(f"{name}: left out: {NO_CHROMIUM}")
                continue
            try:
                answers = measure()
            except ImportError as error:
                print(f"{name}: left out: {error}")
                continue
            rates = [rate for _, rate, _ in answers]
            firsts = [first for _, _, first in answers if first is not None]
            results[name] = {
                "tokens_per_second": statistics.median(rates),
                "first_token_seconds": statistics.median(firsts) if firsts else None,
                "tokens": [tokens for tokens, _, _ in answers],
            }
            print(name, results[name], flush=True)
    if args.json:
        record = {"command": sys.argv, "date": date.today().isoformat(), "programs": results}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
