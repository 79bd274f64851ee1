"""What saving costs training: steps with a save against steps without, in turns, in one process.

    python benchmarks/checkpoint_cost.py [--rounds 5] [--json FILE]

A round is 32 windows of 512 tokens and one optimizer step, as pretrain-small takes them (a quarter
of its batch), with a save just before, whose writing goes on beside it, and the same without. The
recipe saves after a thousand times as many tokens. Beside it: how long the loop waits in `save`,
how long the thread writes, how long a save takes when the loop itself writes, and what memory the
copies take.
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=32, help="windows between saves")
    parser.add_argument("--micro-batch", type=int, default=8, help="windows at once")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args()
    device = choose_device(args.device)
    precision = choose_precision("auto", device)
    recipe = load_recipe("pretrain-small").recipe
    window, batch = recipe.data.window, args.windows
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
    times: dict[str, list[float]] = {
        name: [] for name in ("step_with_a_save", "step_without", "loop_waits_in_save")
    }
    with tempfile.TemporaryDirectory() as name, CheckpointWriter(Path(name), keep=2) as writer:
        run, before = Path(name), resident_bytes()
        writer.save(1, **saved())
        copies = resident_bytes() - before
        writer.wait()
        for number in range(args.rounds):
            waited = timed(lambda n=number: writer.save(2 + n, **saved()))
            times["loop_waits_in_save"].append(waited)
            times["step_with_a_save"].append(waited + timed(step))
            writer.wait()
            times["step_without"].append(timed(step))
        times["thread_writes"] = [
            timed(lambda n=n: (writer.save(100 + n, **saved()), writer.wait())) for n in range(3)
        ]
        times["loop_writes_itself"] = [
            timed(lambda n=n: save_checkpoint(run, 1000 + n, keep=2, **saved())) for n in range(3)
        ]
        newest = max((run / "checkpoints").iterdir())
        size = sum(file.stat().st_size for file in newest.iterdir())
    pairs = zip(times["step_with_a_save"], times["step_without"], strict=True)
    extra = [a - b for a, b in pairs]
    between = recipe.checkpoint.every * recipe.training.batch / batch  # rounds, in the recipe
    cost, plain = statistics.median(extra), statistics.median(times["step_without"])
    parameters = sum(p.numel() for p in model.parameters())
    record = {
        "date": date.today().isoformat(),
        "machine": f"{machine()}, {torch.get_num_threads()} threads, {device}",
        "command": " ".join(["python", *sys.argv]),
        "parameters": parameters,
        "checkpoint_bytes": size,
        "bytes_a_parameter": round(size / parameters, 2),
        "copies_resident_bytes": copies,
        "tokens_between_saves": batch * window,
        "seconds": {name: [round(s, 3) for s in all_s] for name, all_s in times.items()},
        "seconds_a_save_costs": [round(s, 3) for s in extra],
        "share_here": round(cost / plain, 4),
        "share_in_the_recipe": round(cost / (plain * between), 6),
        "least_seconds_between_saves_for_5_percent": round(cost / 0.05, 1),
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
