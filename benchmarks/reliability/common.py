"""Stages, arguments and records of the reliability benchmarks.

Real processes train the smallest model. One process imports torch and forks each of them, which
takes milliseconds; every process has its own memory, files and lock.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.rounds import machine
from minimind.tokenizer import train_tokenizer
from tests.support.small_runs import ForkServer
from tests.support.stages import Stage, make_stage, write_corpus

_RECORDS = Path(__file__).parents[1] / "records"


def arguments(description: str, number: int) -> argparse.Namespace:
    """Parse --number, --seed and --dry; `number` is the default of --number."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--number", type=int, default=number, help="number of repetitions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="do not write the record")
    return parser.parse_args()


@dataclass
class Workshop:
    """A folder with data, a tokenizer, and stages that are created on first use."""

    folder: Path
    fork_server: ForkServer

    def __post_init__(self) -> None:
        self._stages: dict[str, Stage] = {}
        (self.folder / "corpus").mkdir()
        self._corpus = write_corpus(self.folder / "corpus")
        lines = (self._corpus / "text.jsonl").read_text("utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        train_tokenizer(texts, vocab_size=400).save(self.folder / "tokenizer")

    def stage(self, kind: str) -> Stage:
        """Return the stage of a kind, with its uninterrupted run."""
        if kind not in self._stages:
            start = (
                self.stage("pretrain").uninterrupted if kind not in ("pretrain", "moe") else None
            )
            folder = self.folder / kind
            folder.mkdir()
            self._stages[kind] = make_stage(
                kind, self._corpus, self.folder / "tokenizer", start, folder, self.fork_server
            )
        return self._stages[kind]


@contextlib.contextmanager
def workshop() -> Iterator[Workshop]:
    """Yield a Workshop in a temporary folder."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="minimind-reliability-") as name:
        folder = Path(name)
        with contextlib.closing(ForkServer(folder / "output")) as fork_server:
            yield Workshop(folder, fork_server)


def print_progress(done: int, total: int, note: str = "") -> None:
    """Print a line of progress with the time."""
    print(f"{time.strftime('%H:%M:%S')} {done}/{total} {note}".rstrip(), flush=True)


def record(
    row: str, args: argparse.Namespace, metrics: dict[str, Any], file: str = "reliability"
) -> None:
    """Print the metrics of a row and add them to the record."""
    print(json.dumps(metrics, indent=1, ensure_ascii=False))
    if args.dry:
        return
    path = _RECORDS / f"{file}.json"
    rows = json.loads(path.read_text("utf-8")) if path.exists() else {}
    rows[row] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "date": date.today().isoformat(),
    } | metrics
    text = json.dumps(dict(sorted(rows.items())), indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
