"""What saving costs training: steps with a save against steps without, in turns, in one process.

    python benchmarks/checkpoint_cost.py [--rounds 4] [--json benchmarks/records/checkpoint-cost.json]

A round is one optimizer step of the recipe pretrain-small (65,536 tokens) with a save just before,
whose writing goes on beside it, and one without. That is a save at every step, where the recipe
saves at every 250th. Beside it: how long the loop waits in `save`, how long the thread writes, how
long a save takes when the loop itself writes, and what memory the copies take.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from moe_step import wait
from training_speed import machine

from minimind.config import load_recipe
from minimind.model import Transformer
from minimind.model.device import choose_device
from minimind.training.batch import TensorBatch
from minimind.training.checkpoint import CheckpointWriter, save_checkpoint
from minimind.training.objectives.next_token import NextToken
from minimind.training.optimizers import Optimizers
from minimind.training.precision import choose_precision

VOCAB = 6400


def main() -> None:
    """Measure, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=8, help="windows at once")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args()
    device = choose_device(args.device)
    precision = choose_precision("auto", device)
    recipe = load_recipe("pretrain-small").recipe
    window, batch = recipe.data.window, recipe.training.batch
    torch.manual_seed(0)
    model = Transformer(recipe.model.shape(VOCAB)).to(device)
    optimizers = Optimizers(model, recipe.optim)
    objective = NextToken([1] * VOCAB, device)
    tokens = torch.randint(VOCAB, (args.micro_batch, window + 1), device=device)
    windows = TensorBatch(tokens[:, :-1], tokens[:, 1:], None)

    def step() -> None:
        for _ in range(batch // args.micro_batch):
            with precision.autocast():
                loss, _, _ = objective.loss(model, windows)
            (loss / (batch * window)).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        torch._foreach_mul_(gradients, 1 / (norm + 1e-6))
        optimizers.step()
        optimizers.zero_grad()

    def saved() -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "optimizer": optimizers.state_tensors(),
            "state": {"step": 1},
        }

    def timed(work: Callable[[], object]) -> float:
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        return time.perf_counter() - began

    step()
    with tempfile.TemporaryDirectory() as name, CheckpointWriter(Path(name), keep=2) as writer:
        run, before = Path(name), resident_bytes()
        writing: list[float] = []

        def save(number: int) -> None:
            began: list[float] = []
            writer.save(number, **saved(), first=lambda: began.append(time.perf_counter()))
            written.append((began, number))

        written: list[tuple[list[float], int]] = []
        save(1)
        copies = resident_bytes() - before
        writer.wait()
        steps: dict[str, list[float]] = {"with a save": [], "without": []}
        saves: list[float] = []
        for round_ in range(args.rounds):
            wait(device)
            began = time.perf_counter()
            save(round_ + 2)
            saves.append(time.perf_counter() - began)
            step()
            wait(device)
            steps["with a save"].append(time.perf_counter() - began)
            writer.wait()
            steps["without"].append(timed(step))
            done = run / "checkpoints" / f"step-{round_ + 2:08}"
            ended = done.stat().st_ctime
            writing.append(ended - (time.time() - (time.perf_counter() - written[-1][0][0])))
        files = {file.name: file.stat().st_size for file in done.iterdir()}
        itself = [
            timed(lambda n=n: save_checkpoint(run, 1000 + n, keep=2, **saved())) for n in range(3)
        ]
    ratios = [a / b - 1 for a, b in zip(steps["with a save"], steps["without"], strict=True)]
    every = recipe.checkpoint.every
    cost = statistics.median(ratios)
    record = {
        "date": date.today().isoformat(),
        "machine": f"{machine()}, {torch.get_num_threads()} threads, {device}",
        "command": " ".join(["python", *sys.argv]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "checkpoint_bytes": sum(files.values()),
        "bytes_a_parameter": sum(files.values()) / sum(p.numel() for p in model.parameters()),
        "copies_resident_bytes": copies,
        "step_s": {name: [round(s, 3) for s in all_s] for name, all_s in steps.items()},
        "loop_waits_in_save_s": [round(s, 3) for s in saves],
        "thread_writes_s": [round(s, 3) for s in writing],
        "loop_writes_itself_s": [round(s, 3) for s in itself],
        "share_of_time_when_saving_every_step": [round(ratio, 4) for ratio in ratios],
        "median_share_when_saving_every_step": round(cost, 4),
        f"median_share_when_saving_every_{every}_steps": round(cost / every, 6),
    }
    print(json.dumps(record, indent=1))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def resident_bytes() -> int:
    """Memory of this process that is in use."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    main()
