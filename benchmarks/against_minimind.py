"""Time until MiniMind's own pretraining script and this package reach the same bits per byte.

    git clone https://github.com/jingyaogong/minimind ../MiniMind
    pip install datasets
    python -m benchmarks.against_minimind ../MiniMind --data FILE… --held-out FILE… --out DIR

Both train a model of the same shape, with MiniMind's tokenizer, on the same documents. MiniMind's
`trainer/train_pretrain.py` runs first: one epoch on the CPU with one loader process, and otherwise
its defaults; `--accumulation` overrides another one. Then `minimind pretrain` runs with more and
more steps until its bits per byte are as low. Times are those of whole commands, from start to
exit. `minimind eval` measures both models.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.gpu.markdown import table
from benchmarks.rounds import machine
from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_texts

_SEQ_LEN = 340  # MiniMind's default
_BATCH = 24  # sequences per step here: about 8,000 tokens
_HELD_OUT = 300  # documents
_PROGRAM = [sys.executable, "-m", "minimind"]


@dataclass(frozen=True)
class Result:
    """A run: command, wall-clock seconds, held-out bits per byte."""

    name: str
    command: str
    seconds: float
    bits_per_byte: float


def main() -> None:
    """Run both, print a table and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkout", type=Path, help="folder of a checkout of MiniMind v3")
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=8, help="MiniMind's default: 8")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 30, 40, 60, 80, 120, 160, 240])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    args.out.mkdir(parents=True)
    texts = {
        "training": sample(args.data, args.documents, args.out / "train.jsonl"),
        "held-out": sample(args.held_out, _HELD_OUT, args.out / "held-out.jsonl"),
    }
    checkout = args.out / "MiniMind"
    shutil.copytree(args.checkout, checkout, ignore=shutil.ignore_patterns(".git", "images"))

    theirs = run_theirs(args, checkout)
    model = args.out / "theirs"
    weights = checkout / "out" / f"pretrain_{args.hidden_size}.pth"
    call([*_PROGRAM, "import", str(weights), "--tokenizer", str(checkout / "model"),
          "--out", str(model)])  # fmt: skip
    results = [Result("MiniMind", *theirs, bits_per_byte(model, args))]
    shape = json.loads((model / "config.json").read_text("utf-8"))
    for steps in args.steps:
        run = args.out / f"steps-{steps}"
        command = ours(args, checkout, shape, steps, run)
        measured = call(command)
        results.append(Result(f"{steps} steps", *measured, bits_per_byte(run, args)))
        if results[-1].bits_per_byte <= results[0].bits_per_byte:
            break
    record: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.against_minimind", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": machine(),
        "texts": texts,
        "parameters": int(json.loads((run / "summary.json").read_text("utf-8"))["parameters"]),
        "results": [asdict(result) for result in results],
    }
    rows = [
        [r.name, f"{r.seconds:.0f}", f"{r.bits_per_byte:.3f}", f"{theirs[1] / r.seconds:.1f}"]
        for r in results
    ]
    header = ["run", "seconds", "bits per byte", "MiniMind's time divided by this"]
    print("\n".join(table(header, rows)))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")


def sample(files: Sequence[Path], count: int, path: Path) -> dict[str, int]:
    """Write `count` random documents as JSON lines; return numbers of documents and bytes."""
    texts = list(read_texts(files, invalid=InvalidRecords()))
    texts = random.Random(0).sample(texts, min(count, len(texts)))
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    return {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)}


def run_theirs(args: argparse.Namespace, checkout: Path) -> tuple[str, float]:
    """Train with MiniMind's script; return the command and its seconds."""
    command = [
        *(sys.executable, "train_pretrain.py", "--device", "cpu", "--epochs", "1"),
        *("--num_workers", "1", "--accumulation_steps", str(args.accumulation)),
        *("--hidden_size", str(args.hidden_size), "--num_hidden_layers", str(args.layers)),
        *("--data_path", str((args.out / "train.jsonl").resolve()), "--log_interval", "20"),
    ]
    return call(command, folder=checkout / "trainer")


def ours(
    args: argparse.Namespace, checkout: Path, shape: dict[str, Any], steps: int, run: Path
) -> list[str]:
    """Return the command that trains a model of the same shape."""
    keys = (
        *("hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "head_dim"),
    )
    settings = {f"model.{key}": shape[key] for key in keys} | {
        "model.qk_norm": "true",
        "model.max_position_embeddings": _SEQ_LEN,
        "data.seq_len": _SEQ_LEN,
        "optim.lr": 6e-3,
        "schedule.warmup": 0.03,
        "training.steps": steps,
        "training.global_batch_size": _BATCH,
        "validation.num_sequences": 8,
        "validation.prompts": "[]",
    }
    return [
        *(*_PROGRAM, "pretrain", "pretrain-small"),
        *(f"{key}={value}" for key, value in settings.items()),
        *("--data", str(args.out / "train.jsonl")),
        *("--tokenizer", str(checkout / "model"), "--out", str(run)),
    ]


def bits_per_byte(model: Path, args: argparse.Namespace) -> float:
    """Return the held-out bits per byte, in contexts as long as those of training."""
    path = args.out / f"{model.name}.json"
    task = f"bpb:{args.out / 'held-out.jsonl'}"
    call([*_PROGRAM, "eval", str(model), "--task", task, "--context", str(_SEQ_LEN),
          "--out", str(args.out / "eval"), "--json", str(path)])  # fmt: skip
    results = json.loads(path.read_text("utf-8"))["models"]
    result: float = results[model.name][task]["bits_per_byte"]
    return result


def call(command: Sequence[str], folder: Path | None = None) -> tuple[str, float]:
    """Run a command; return it as a line, and its seconds."""
    line = shlex.join(["python", *command[1:]])
    print(line, flush=True)
    started = time.monotonic()
    subprocess.run(command, cwd=folder, check=True)
    return line, time.monotonic() - started


if __name__ == "__main__":
    main()
