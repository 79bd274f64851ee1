"""A service under load, under attack, and at shutdown.

    python benchmarks/reliability/service_load.py [--preset small] [--only 23 25 28] [--dry]

`minimind serve` runs in a separate process with 16 slots, on a model with random weights that
never ends an answer by itself.

Row 23: 1,000 answers of 40 tokens, 64 at a time. Half of the clients disconnect at a random token;
the complete answers are compared with those of the same requests served one at a time.
Row 25: for half a minute 64 requests stream while attackers send slowly, send too much, send
deeply nested JSON, declare a wrong length, or do not read; /health is requested every 20 ms.
Row 28: 50 services are stopped during three requests of 16 streams.

Clients and service share the machine's cores, so all times include waiting for them.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import httpx2 as httpx
import psutil

from benchmarks.rounds import machine
from tests.support.clients import answers_alone, churn, metric, stop_during_streams
from tests.support.services import Process, serving, wait_until

RECORD = Path(__file__).parents[1] / "records" / "service-reliability"
CHAT = "/v1/chat/completions"
AT_ONCE, REQUESTS, SHUTDOWNS, SECONDS = 64, 1000, 50, 30
THREADS = str(os.cpu_count())  # of the service, so that it uses every core
LIMITS = {"health_ms": 100, "back_s": 1, "shutdown_s": 5}


def main() -> None:
    """Measure the selected rows, print them, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--only", nargs="*", default=["23", "25", "28"], choices=["23", "25", "28"])
    parser.add_argument("--dry", action="store_true", help="do not write the record")
    args = parser.parse_args()
    rows: dict[str, Callable[[Path, Path], dict[str, Any]]]
    rows = {"23": under_load, "25": under_attack, "28": at_shutdown}
    metrics: dict[str, Any] = {}
    path = RECORD.with_suffix(".json")
    if path.exists():
        metrics = json.loads(path.read_text("utf-8"))
    with tempfile.TemporaryDirectory(prefix="minimind-load-") as name:
        folder = Path(name)
        make_model(folder / "models" / "tiny", args.preset)
        for row in args.only:
            result = rows[row](folder / "models", folder / "log")
            metrics[row] = {
                "command": " ".join(["python", *sys.argv]),
                "machine": machine(),
                "date": date.today().isoformat(),
                "preset": args.preset,
            } | result
            print(row, json.dumps(result, indent=1), flush=True)
    if not args.dry:
        path.write_text(json.dumps(dict(sorted(metrics.items())), indent=1) + "\n", "utf-8")


def make_model(directory: Path, preset: str) -> None:
    """Save a model with random weights that never chooses a token that ends an answer."""
    import torch

    from minimind.data.textbook import prose
    from minimind.model import PRESETS, ModelConfig, Transformer, save_model
    from minimind.tokenizer import train_tokenizer

    sentences = prose(1)
    tokenizer = train_tokenizer([next(sentences) for _ in range(20_000)])
    torch.manual_seed(0)
    shape = PRESETS[preset] | {"vocab_size": tokenizer.vocab_size}
    model = Transformer(ModelConfig(**shape))
    with torch.no_grad():
        model.head_weight[[tokenizer.im_end, tokenizer.end_of_text]] = 0
    save_model(directory, model, tokenizer)


# Load


def under_load(models: Path, log: Path) -> dict[str, Any]:
    """Measure two rounds of the same load: a memory leak would grow in the second."""
    with serving(models, log, OMP_NUM_THREADS=THREADS) as service:
        process = psutil.Process(service.child.pid)
        expected = asyncio.run(answers_alone(service.url))
        assert len(set(expected)) > 1
        rounds = []
        for _ in range(2):
            began = time.monotonic()
            completed, abandoned = asyncio.run(churn(service.url, REQUESTS, AT_ONCE, expected))
            ended = time.monotonic()
            wait_until(lambda: metric(service, "running") == metric(service, "waiting") == 0)
            back = time.monotonic() - ended
            time.sleep(max(0, LIMITS["back_s"] - back))
            rounds.append(
                {
                    "seconds": round(ended - began, 1),
                    "heard_and_equal": completed,
                    "left": abandoned,
                    "slots_back_seconds": round(back, 3),
                    "rss_mb_a_second_later": round(process.memory_info().rss / 2**20, 1),
                }
            )
            print(rounds[-1], flush=True)
        assert asyncio.run(answers_alone(service.url)) == expected
    return {"requests_a_round": REQUESTS, "at_once": AT_ONCE, "rounds": rounds}


# Attack


def under_attack(models: Path, log: Path) -> dict[str, Any]:
    """Measure /health on an idle service, with all slots in use, and also under attack."""
    with serving(models, log, OMP_NUM_THREADS=THREADS) as service:
        quiet = health_during(service, [])
        full = health_during(service, [streams])
        all_ = health_during(service, [streams, attackers])
        statuses = Counter(all_.pop("statuses"))
        assert metric(service, "running") <= 16
    return {
        "seconds_each": SECONDS,
        "quiet": quiet,
        "full_slots": full,
        "full_slots_and_attacked": all_,
        "answers_to_attackers": {
            str(status): number for status, number in sorted(statuses.items())
        },
    }


def health_during(service: Process, others: list[Callable[..., None]]) -> dict[str, Any]:
    """Request /health repeatedly while each function of `others` runs in its own process."""
    context = multiprocessing.get_context("spawn")
    statuses = context.Queue()
    children = [context.Process(target=other, args=(service.url, statuses)) for other in others]
    for child in children:
        child.start()
    if others:
        wait_until(lambda: metric(service, "running") == 16, seconds=60)
    seconds = sorted(health_seconds(service.url))
    for child in children:
        child.terminate()
        child.join()
    result: dict[str, Any] = {
        "asked": len(seconds),
        "median_ms": round(1000 * median(seconds), 1),
        "p99_ms": round(1000 * seconds[int(0.99 * len(seconds))], 1),
        "max_ms": round(1000 * seconds[-1], 1),
        "over_100_ms": sum(1000 * s > LIMITS["health_ms"] for s in seconds),
    }
    if attackers in others:
        result["statuses"] = []
        while not statuses.empty():
            result["statuses"].append(statuses.get())
    wait_until(lambda: metric(service, "running") == metric(service, "waiting") == 0)
    return result


def health_seconds(url: str) -> Iterator[float]:
    """Yield the seconds per request of /health, including the connection, every 20 ms."""
    host, port = url.removeprefix("http://").split(":")
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        began = time.perf_counter()
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(
                b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
            )
            data = b""
            while received := connection.recv(4096):
                data += received
        yield time.perf_counter() - began
        assert data.startswith(b"HTTP/1.1 200"), data
        time.sleep(0.02)


def streams(url: str, statuses: Any) -> None:
    """Keep 64 streaming requests open: 16 are decoded, the others wait in the queue."""

    async def stream_repeatedly(client: httpx.AsyncClient) -> None:
        request = body(stream=True, max_tokens=200)
        headers = {"content-type": "application/json"}
        while True:
            async with client.stream("POST", CHAT, content=request, headers=headers) as answer:
                async for _ in answer.aiter_lines():
                    pass

    async def run_all() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=None) as client:
            await asyncio.gather(*(stream_repeatedly(client) for _ in range(AT_ONCE)))

    asyncio.run(run_all())


def body(**more: Any) -> bytes:
    """Return the body of a valid request."""
    defaults = {"model": "tiny", "messages": [{"role": "user", "content": "长江有多长？"}]}
    return json.dumps(defaults | more).encode()


def head(length: object, more: str = "") -> bytes:
    """Return the head of a request with this Content-Length."""
    return (
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {length}\r\n{more}\r\n"
    ).encode()


def attackers(url: str, statuses: Any) -> None:
    """Run a hundred attackers repeatedly; put the statuses of their responses into `statuses`."""
    host, port = url.removeprefix("http://").split(":")
    deep = b"[" * 500_000
    nested = b'{"model":"tiny","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    long = body(messages=[{"role": "user", "content": "长" * 300_000}])
    many = body(messages=[{"role": "user", "content": "a"}] * 20_000)
    wrong = body(messages=[{"role": "user", "content": [1] * 300_000}])
    keys = json.dumps({f"k{i}": i for i in range(60_000)}).encode()
    odd = {
        "a long text": head(len(long)) + long,
        "many messages": head(len(many)) + many,
        "many mistakes": head(len(wrong)) + wrong,
        "many keys": head(len(keys)) + keys,
        "deep": head(len(deep)) + deep,
        "nested": head(len(nested)) + nested,
        "a length too large": head(10**12),
        "a negative length": head("-5"),
        "two lengths": head(5, "transfer-encoding: chunked\r\n") + b"0\r\n\r\n",
        "more than declared": head(2) + b"{}" + b"x" * 100_000,
        "no HTTP": os.urandom(5000) + b"\r\n\r\n",
        "too many headers": head(2, "".join(f"x-{i}: y\r\n" for i in range(20_000))),
    }

    async def once(sent: bytes) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(sent)
            await writer.drain()
            status = (await reader.read(65536)).split(b" ", 2)[1:2]
            statuses.put(int(status[0]) if status else 0)
        finally:
            writer.close()

    async def endless_body() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            chunked = "transfer-encoding: chunked\r\n\r\n"
            writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n{chunked}".encode())
            while not (reader.at_eof() or writer.transport.is_closing()):
                writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
                await writer.drain()
        finally:
            with contextlib.suppress(OSError):
                statuses.put(int((await reader.read(65536)).split(b" ", 2)[1]))
            writer.close()

    async def slowly(sent: bytes) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            for i in range(len(sent)):
                writer.write(sent[i : i + 1])
                await asyncio.sleep(0.2)
                if reader.at_eof() or writer.transport.is_closing():
                    break
        finally:
            writer.close()

    async def reads_nothing() -> None:
        request = body(stream=True, n=4, logprobs=True, top_logprobs=20, max_tokens=200)
        _, writer = await asyncio.open_connection(host, int(port), limit=1024)
        try:
            writer.write(head(len(request)) + request)
            await asyncio.sleep(20)
        finally:
            writer.close()

    async def repeat(attack: Callable[[], Any], pause: float) -> None:
        dice = random.Random(pause)
        while True:
            with contextlib.suppress(OSError, IndexError, ValueError):
                await attack()
            await asyncio.sleep(pause * dice.random())

    async def run_all() -> None:
        slow = [lambda: slowly(head(50)), lambda: slowly(head(5000) + b" " * 1000)]
        all_ = [repeat(slow[i % 2], 0.1) for i in range(60)]
        all_ += [repeat(lambda sent=sent: once(sent), 1.0) for sent in odd.values()]
        all_ += [repeat(endless_body, 1.0), repeat(endless_body, 1.0)]
        all_ += [repeat(reads_nothing, 1.0) for _ in range(8)]
        await asyncio.gather(*all_)

    asyncio.run(run_all())


# Shutdown


def at_shutdown(models: Path, log: Path) -> dict[str, Any]:
    """Measure shutdowns by SIGTERM and Ctrl-C alternately; `stop_during_streams` checks them."""
    seconds = []
    for number in range(SHUTDOWNS):
        by = signal.SIGTERM if number % 2 else signal.SIGINT
        seconds.append(stop_during_streams(models, log, by))
        print(f"{number + 1}/{SHUTDOWNS} {seconds[-1]:.2f} s", flush=True)
    return {
        "times": SHUTDOWNS,
        "median_seconds": round(median(seconds), 2),
        "max_seconds": round(max(seconds), 2),
    }


if __name__ == "__main__":
    main()
