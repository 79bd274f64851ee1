"""Chat speed of a trained model: in the service, in llama.cpp, and in its page in a browser.

    pip install -c constraints.txt -e '.[bench,test]'
    python -m benchmarks.chat_speed out/night [--llama-server PATH] [--json FILE]

Every program answers the same questions, each in a new conversation: the service and llama.cpp's
`llama-server` greedily, the page with its own settings. Tokens per second: tokens of an answer by
the time from the request to its end, in the page by its own statement, which leaves the prompt out;
the median over questions. The page needs Chromium. A program that is not installed is left out,
with a note.
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
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.serving_speed import llama_server, running
from minimind.data.textbook import DEMO_QUESTIONS
from minimind.export.gguf import export_gguf
from minimind.export.web import export_web
from minimind.model import resolve_model_directory
from tests.support.chromium import HAS_CHROMIUM, NO_CHROMIUM, start_chromium

_TOKENS = 256  # at most, per answer
_PAGE_SECONDS = 120.0
_RATE = re.compile(r"(\d+) tokens · ([\d.]+) tokens/s")

# Of each answer: tokens, tokens per second, seconds to its first token (None if unknown).
Answers = Sequence[tuple[int, float, float | None]]


def service(command: Callable[[int], list[str]], work: Path, threads: int) -> Answers:
    """Ask a service. command: returns its command for a port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with running(command(port), port, threads, work / "log"):
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


def _serve(model: Path, options: Sequence[str], port: int) -> list[str]:
    """Return the command of `minimind serve`."""
    command = [sys.executable, "-m", "minimind", "serve", str(model), "--device", "cpu"]
    return [*command, "--port", str(port), *options]


def main() -> None:
    """Measure every program, print a table, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, help="model or run directory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-server", type=Path, help="path of llama.cpp's server")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        directory = resolve_model_directory(args.model)
        measured: dict[str, Callable[[], Answers]] = {}
        for kind, options in ("bf16", ()), ("int8", ("--int8",)):
            command = functools.partial(_serve, args.model, options)
            measured[f"service, {kind}"] = functools.partial(service, command, work, args.threads)
        for kind in ("F16", "Q8_0") if args.llama_server else ():
            file = work / f"{kind}.gguf"
            export_gguf(directory, file, type=kind.lower())
            command = functools.partial(
                llama_server, args.llama_server, str(file), threads=args.threads, streams=1
            )
            measured[f"llama-server, {kind}"] = functools.partial(
                service, command, work, args.threads
            )
        if HAS_CHROMIUM:
            export_web(directory, work / "page", name="model")
            measured["page in Chromium, Q8_0"] = lambda: page(work / "page")
        else:
            print(f"page: left out: {NO_CHROMIUM}")
        for name, measure in measured.items():
            answers = measure()
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
