"""Streams over HTTP: minimind's service against servers of llama.cpp, at equal concurrency.

    pip install -c constraints.txt -e '.[bench,llama-cpp]' 'llama-cpp-python[server]'
    python -m benchmarks.serving_speed [--llama-server PATH] [--rounds 3] [--json FILE]

All serve the same random weights. Each client streams `--tokens` greedy tokens after a different
prompt, all clients concurrently. Measured: tokens per second of all streams, from the first request
to the last token; time to first token and time between pieces of text, at p50 and p99 over all
streams; peak memory of the server. Servers run one after the other, each started anew per round,
with one warm-up.

llama-cpp-python's server decodes one request at a time. llama.cpp's own, `llama-server`, batches
them; it is measured if `--llama-server` names the binary.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

from benchmarks.decoding_speed import prepare
from benchmarks.rounds import over_rounds

_START_SECONDS = 120.0


def commands(work: Path, args: argparse.Namespace, port: int) -> dict[str, list[str]]:
    """Return the command of each server."""
    minimind = [sys.executable, "-m", "minimind", "serve", str(work / "model"), "--device", "cpu"]
    minimind += ["--slots", str(args.streams), "--port", str(port)]
    python = [sys.executable, "-m", "llama_cpp.server", "--port", str(port)]
    python += ["--n_threads", str(args.threads), "--n_ctx", "512", "--interrupt_requests", "false"]
    result = {"minimind bf16": minimind, "minimind int8": [*minimind, "--int8"]}
    for kind in ("F16", "Q8_0"):
        file = str(work / f"{kind}.gguf")
        if args.llama_server is None:
            result[f"llama-cpp-python {kind}"] = [*python, "--model", file]
        else:
            command = llama_server(args.llama_server, file, port, args.threads, args.streams)
            result[f"llama-server {kind}"] = command
    return result


def llama_server(binary: Path, file: str, port: int, threads: int, streams: int) -> list[str]:
    """Return the command of llama.cpp's server for `streams` concurrent requests."""
    command = [str(binary), "-m", file, "--port", str(port), "-t", str(threads)]
    return [*command, "-np", str(streams), "-c", str(512 * streams)]


@contextlib.contextmanager
def running(command: list[str], port: int, threads: int, log: Path) -> Iterator[int]:
    """Start a server and wait until it answers; yield its process id."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models"),
            ):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{command} did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def stream(port: int, number: int, tokens: int) -> list[float]:
    """Return the times at which a request was sent and each of its pieces of text arrived."""
    prompt = f"{number} rivers, mountains and seas of the world: " + "the long river " * 6
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body | {"model": "model"}).encode(),
        {"Content-Type": "application/json"},
    )
    times = [time.perf_counter()]
    reason = None
    with urllib.request.urlopen(request) as response:
        for line in response:
            if line.startswith(b"data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                reason = choice["finish_reason"] or reason
                if choice["text"]:
                    times.append(time.perf_counter())
    assert reason == "length", f"a completion ended early: {reason}"
    return times


def streams(port: int, count: int, tokens: int) -> list[list[float]]:
    """Run `count` requests concurrently."""
    with ThreadPoolExecutor(count) as executor:
        return list(executor.map(lambda number: stream(port, number, tokens), range(count)))


def measure(
    command: list[str], port: int, args: argparse.Namespace, work: Path
) -> dict[str, float]:
    """Measure one server."""
    with running(command, port, args.threads, work / "log") as process:
        streams(port, args.streams, 8)  # warm-up
        times = streams(port, args.streams, args.tokens)
        status = Path(f"/proc/{process}/status").read_text()
    first = [1e3 * (t[1] - t[0]) for t in times]
    between = [1e3 * (b - a) for t in times for a, b in pairwise(t[1:])]
    seconds = max(t[-1] for t in times) - min(t[0] for t in times)
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return {
        "tokens_per_second": args.streams * args.tokens / seconds,
        "first_p50_ms": percentile(first, 50),
        "first_p99_ms": percentile(first, 99),
        "between_p50_ms": percentile(between, 50),
        "between_p99_ms": percentile(between, 99),
        "peak_mb": int(peak) / 1024,
    }


def percentile(values: list[float], percent: int) -> float:
    """Return a percentile, one of the values."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def main() -> None:
    """Measure every server in turns, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-server", type=Path, help="path of llama.cpp's server")
    parser.add_argument("--only", nargs="*", help="beginnings of the names of servers")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        args.work = work = Path(folder)
        prepare(args)
        for _ in range(args.rounds):
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            for name, command in commands(work, args, port).items():
                if not args.only or name.startswith(tuple(args.only)):
                    rounds.setdefault(name, []).append(measure(command, port, args, work))
                    print(name, rounds[name][-1], flush=True)
    metrics = over_rounds(rounds)
    for name, values in metrics.items():
        print(name, {key: round(value["median"], 1) for key, value in values.items()})
    if args.json:
        record = {"command": sys.argv, "over_rounds": metrics, "rounds": rounds}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
