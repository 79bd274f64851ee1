"""Cost of saving a checkpoint: training steps with and without a save, alternating in one process.

    python benchmarks/checkpoint_cost.py [--rounds 2] [--threads 1] [--json FILE]

A round is one optimizer step of `small` on 8 sequences of 512 tokens right after a save, which is
written in the background, and one step without a save. The recipe pretrain-small saves after 4,000
times as many tokens. Also measured: the wait of the loop in `save`, the duration of a save, the
time of a synchronous save, and the memory of the copy. Both wall-clock and CPU seconds are
recorded; CPU seconds do not depend on other processes of the machine. The CPU seconds of a save
(copy, hashes and writing) are an upper bound of its cost for training. Threads that wait for each
other count as busy, so give --threads 1 if there are fewer free cores than threads.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.rounds import clocked, machine
from minimind.config import load_recipe
from minimind.model import Transformer
from minimind.model.device import choose_device
from minimind.training.batch import TensorBatch, label_indices
from minimind.training.checkpoint import save_checkpoint
from minimind.training.checkpoint_writer import CheckpointWriter
from minimind.training.objectives.next_token import NextToken
from minimind.training.optimizers import Optimizers
from minimind.training.precision import choose_precision

VOCAB = 6400


def main() -> None:
    """Measure the costs, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=8, help="sequences per step")
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences per micro-batch")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    device = choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    precision = choose_precision("auto", device)
    recipe = load_recipe("pretrain-small").recipe
    seq_len, batch = recipe.data.seq_len, args.sequences
    torch.manual_seed(0)
    model = Transformer(recipe.model.shape(VOCAB)).to(device)
    optimizers = Optimizers(model, recipe.optim)
    objective = NextToken([1] * VOCAB, device)
    tokens = torch.randint(VOCAB, (args.micro_batch, seq_len + 1), device=device)
    sequences = TensorBatch(tokens[:, :-1], tokens[:, 1:], None, label_indices(tokens[:, 1:]))

    def step() -> None:
        for _ in range(batch // args.micro_batch):
            with precision.autocast():
                loss = objective.loss(model, sequences).loss_sum
            (loss / (batch * seq_len)).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        torch._foreach_mul_(gradients, 1 / (norm + 1e-6))
        optimizers.step()
        optimizers.zero_grad()

    def checkpoint() -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "optimizer": optimizers.state_tensors(),
            "state": {"step": 1},
        }

    times: dict[str, dict[str, list[float]]] = {
        name: {"clock": [], "processor": []}
        for name in ("step", "step_beside_a_save", "loop_waits", "save", "loop_writes_itself")
    }

    def timed(name: str, work: Callable[[], object]) -> None:
        seconds, cpu_seconds = clocked(work, device)
        times[name]["clock"].append(seconds)
        times[name]["processor"].append(cpu_seconds)

    for _ in range(2):
        step()
    with tempfile.TemporaryDirectory() as name, CheckpointWriter(Path(name), keep=2) as writer:
        run, before = Path(name), peak_bytes()

        def save_and_wait(number: int) -> None:
            writer.save(number, **checkpoint())
            writer.wait()

        for number in range(2, args.rounds + 2):
            timed("loop_waits", lambda n=number: writer.save(n, **checkpoint()))
            timed("step_beside_a_save", step)
            writer.wait()
            timed("step", step)
        for number in range(100, 105):
            timed("save", lambda n=number: save_and_wait(n))
            timed(
                "loop_writes_itself",
                lambda n=number: save_checkpoint(run, n, keep=2, **checkpoint()),
            )
        peak = peak_bytes()
        newest = max((run / "checkpoints").iterdir())
        size = sum(file.stat().st_size for file in newest.iterdir())
    median = {
        clock: {name: statistics.median(both[clock]) for name, both in times.items()}
        for clock in ("clock", "processor")
    }
    # Measured steps between two saves of the recipe.
    between = recipe.checkpoint.every * recipe.training.global_batch_size / batch
    by_clock, by_processor = median["clock"], median["processor"]
    cost = by_clock["loop_waits"] + by_clock["step_beside_a_save"] - by_clock["step"]
    parameters = sum(p.numel() for p in model.parameters())
    record = {
        "date": date.today().isoformat(),
        "machine": f"{machine()}, {torch.get_num_threads()} threads, {device}",
        "command": " ".join(["python", *sys.argv]),
        "parameters": parameters,
        "checkpoint_bytes": size,
        "bytes_per_parameter": round(size / parameters, 2),
        "peak_resident_bytes": {"before_the_first_save": before, "in_the_end": peak},
        "tokens_per_step": batch * seq_len,
        "median_seconds": {
            clock: {name: round(value, 3) for name, value in all_s.items()}
            for clock, all_s in median.items()
        },
        "seconds": {
            name: {clock: [round(value, 3) for value in all_s] for clock, all_s in both.items()}
            for name, both in times.items()
        },
        "share_when_saving_every_step": {
            "clock": round(cost / by_clock["step"], 4),
            "processor": round(by_processor["save"] / by_processor["step"], 4),
        },
        "share_in_the_recipe": {
            "clock": round(cost / by_clock["step"] / between, 6),
            "processor": round(by_processor["save"] / by_processor["step"] / between, 6),
        },
    }
    print(json.dumps(record, indent=1))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10  # Linux counts in KiB


if __name__ == "__main__":
    main()
