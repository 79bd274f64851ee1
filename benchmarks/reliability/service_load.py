"""Rows 23, 25 and 28: a service under load, under attack, and at its end.

    python benchmarks/reliability/service_load.py [--preset small] [--only 23 25 28] [--dry]

`minimind serve` runs in a process of its own with 16 slots, on a model with random weights that
never ends an answer by itself. Row 23: 1,000 answers of 40 tokens, 64 at once, half of them left at
a random token; what is heard to its end is compared with the same question asked alone. Row 25: for
half a minute 64 streams go on while clients send slowly, too much, too deeply nested, something
else than they said, or do not read; another process asks for /health every 20 ms.
Row 28: 50 services are stopped in the middle of three requests of 16 streams.

Clients and service share the machine's cores, so that all times include waiting for those.
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

from benchmarks.training_speed import machine
from tests.support.clients import churn, each_alone, metric, stop_during_streams
from tests.support.services import Process, serving, wait_until

RECORD = Path(__file__).parents[1] / "records" / "service-reliability"
CHAT = "/v1/chat/completions"
AT_ONCE, REQUESTS, SHUTDOWNS, SECONDS = 64, 1000, 50, 30
THREADS = str(os.cpu_count())  # of the service: it is to be as busy as it can be
LIMITS = {"health_ms": 100, "back_s": 1, "shutdown_s": 5}


def main() -> None:
    """Run the rows, print them, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--only", nargs="*", default=["23", "25", "28"], choices=["23", "25", "28"])
    parser.add_argument("--dry", action="store_true", help="leave the record alone")
    args = parser.parse_args()
    rows: dict[str, Callable[[Path, Path], dict[str, Any]]]
    rows = {"23": come_and_go, "25": attacked, "28": stopped}
    metrics: dict[str, Any] = {}
    path = RECORD.with_suffix(".json")
    if path.exists():
        metrics = json.loads(path.read_text("utf-8"))
    with tempfile.TemporaryDirectory(prefix="minimind-load-") as name:
        folder = Path(name)
        make_model(folder / "models" / "tiny", args.preset)
        for row in args.only:
            found = rows[row](folder / "models", folder / "log")
            metrics[row] = {
                "command": " ".join(["python", *sys.argv]),
                "machine": machine(),
                "date": date.today().isoformat(),
                "preset": args.preset,
            } | found
            print(row, json.dumps(found, indent=1), flush=True)
    if not args.dry:
        path.write_text(json.dumps(dict(sorted(metrics.items())), indent=1) + "\n", "utf-8")


def make_model(directory: Path, preset: str) -> None:
    """Random weights; the tokens that end an answer are never the likeliest."""
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


# Row 23


def come_and_go(models: Path, log: Path) -> dict[str, Any]:
    """Rounds of the same load: memory that is kept for good would grow with each."""
    with serving(models, log, OMP_NUM_THREADS=THREADS) as service:
        process = psutil.Process(service.child.pid)
        alone = asyncio.run(each_alone(service.url))
        assert len(set(alone)) > 1
        rounds = []
        for _ in range(2):
            began = time.monotonic()
            heard, left = asyncio.run(churn(service.url, REQUESTS, AT_ONCE, alone))
            ended = time.monotonic()
            wait_until(lambda: metric(service, "running") == metric(service, "waiting") == 0)
            back = time.monotonic() - ended
            time.sleep(max(0, LIMITS["back_s"] - back))
            rounds.append(
                {
                    "seconds": round(ended - began, 1),
                    "heard_and_equal": heard,
                    "left": left,
                    "slots_back_seconds": round(back, 3),
                    "rss_mb_a_second_later": round(process.memory_info().rss / 2**20, 1),
                }
            )
            print(rounds[-1], flush=True)
        assert asyncio.run(each_alone(service.url)) == alone
    return {"requests_a_round": REQUESTS, "at_once": AT_ONCE, "rounds": rounds}


# Row 25


def attacked(models: Path, log: Path) -> dict[str, Any]:
    """How long /health takes: with nothing else going, under full slots, and under attack too."""
    with serving(models, log, OMP_NUM_THREADS=THREADS) as service:
        quiet = with_others(service, [])
        full = with_others(service, [streams])
        all_ = with_others(service, [streams, attackers])
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


def with_others(service: Process, others: list[Callable[..., None]]) -> dict[str, Any]:
    """Ask for /health while others do what they do, each kind in a process of its own."""
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    helpers = [context.Process(target=other, args=(service.url, said)) for other in others]
    for helper in helpers:
        helper.start()
    if others:
        wait_until(lambda: metric(service, "running") == 16, seconds=60)
    took = sorted(asked_for_health(service.url))
    for helper in helpers:
        helper.terminate()
        helper.join()
    found: dict[str, Any] = {
        "asked": len(took),
        "median_ms": round(1000 * median(took), 1),
        "p99_ms": round(1000 * took[int(0.99 * len(took))], 1),
        "max_ms": round(1000 * took[-1], 1),
        "over_100_ms": sum(seconds * 1000 > LIMITS["health_ms"] for seconds in took),
    }
    if attackers in others:
        found["statuses"] = []
        while not said.empty():
            found["statuses"].append(said.get())
    wait_until(lambda: metric(service, "running") == metric(service, "waiting") == 0)
    return found


def asked_for_health(url: str) -> Iterator[float]:
    """Seconds from connecting to the whole answer, every 20 ms for the time of the row."""
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


def streams(url: str, said: Any) -> None:
    """64 streams all the time: 16 are written, the others wait."""

    async def on_and_on(client: httpx.AsyncClient) -> None:
        asked = body(stream=True, max_tokens=200)
        headers = {"content-type": "application/json"}
        while True:
            async with client.stream("POST", CHAT, content=asked, headers=headers) as answer:
                async for _ in answer.aiter_lines():
                    pass

    async def everyone() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=None) as client:
            await asyncio.gather(*(on_and_on(client) for _ in range(AT_ONCE)))

    asyncio.run(everyone())


def body(**more: Any) -> bytes:
    """A request that can be answered."""
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "长江有多长？"}]}
    return json.dumps(asked | more).encode()


def head(length: object, more: str = "") -> bytes:
    """The beginning of a request that says so much of its length."""
    return (
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {length}\r\n{more}\r\n"
    ).encode()


def attackers(url: str, said: Any) -> None:
    """A hundred bad clients, each again and again; the statuses that they get go into `said`."""
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
        "a length too great": head(10**12),
        "a length that is none": head("-5"),
        "two lengths": head(5, "transfer-encoding: chunked\r\n") + b"0\r\n\r\n",
        "more than it said": head(2) + b"{}" + b"x" * 100_000,
        "no HTTP": os.urandom(5000) + b"\r\n\r\n",
        "too many headers": head(2, "".join(f"x-{i}: y\r\n" for i in range(20_000))),
    }

    async def once(sent: bytes) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(sent)
            await writer.drain()
            status = (await reader.read(65536)).split(b" ", 2)[1:2]
            said.put(int(status[0]) if status else 0)
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
                said.put(int((await reader.read(65536)).split(b" ", 2)[1]))
            writer.close()

    async def slowly(sent: bytes) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            for place in range(len(sent)):
                writer.write(sent[place : place + 1])
                await asyncio.sleep(0.2)
                if reader.at_eof() or writer.transport.is_closing():
                    break
        finally:
            writer.close()

    async def reads_nothing() -> None:
        asked = body(stream=True, n=4, logprobs=True, top_logprobs=20, max_tokens=200)
        _, writer = await asyncio.open_connection(host, int(port), limit=1024)
        try:
            writer.write(head(len(asked)) + asked)
            await asyncio.sleep(20)
        finally:
            writer.close()

    async def again_and_again(attack: Callable[[], Any], pause: float) -> None:
        dice = random.Random(pause)
        while True:
            with contextlib.suppress(OSError, IndexError, ValueError):
                await attack()
            await asyncio.sleep(pause * dice.random())

    async def everyone() -> None:
        slow = [lambda: slowly(head(50)), lambda: slowly(head(5000) + b" " * 1000)]
        all_ = [again_and_again(slow[i % 2], 0.1) for i in range(60)]
        all_ += [again_and_again(lambda sent=sent: once(sent), 1.0) for sent in odd.values()]
        all_ += [again_and_again(endless_body, 1.0), again_and_again(endless_body, 1.0)]
        all_ += [again_and_again(reads_nothing, 1.0) for _ in range(8)]
        await asyncio.gather(*all_)

    asyncio.run(everyone())


# Row 28


def stopped(models: Path, log: Path) -> dict[str, Any]:
    """Stopped by SIGTERM and Ctrl-C in turns; what must hold is asserted there."""
    took = []
    for number in range(SHUTDOWNS):
        by = signal.SIGTERM if number % 2 else signal.SIGINT
        took.append(stop_during_streams(models, log, by))
        print(f"{number + 1}/{SHUTDOWNS} {took[-1]:.2f} s", flush=True)
    return {
        "times": SHUTDOWNS,
        "median_seconds": round(median(took), 2),
        "max_seconds": round(max(took), 2),
    }


if __name__ == "__main__":
    main()
