"""Runs resumed with 1, 2 or 4 processes: the same samples, losses within 1e-4.

    python benchmarks/reliability/process_count.py [--number 5]

For each kind of stage, an uninterrupted run of 60 steps of 8 sequences by one process is compared
with --number runs that are each stopped four times, by a signal to a random process at a random
moment, and resumed with another number of processes each time; and with uninterrupted runs of 2
and 4 processes. Samples are compared by number and order, losses and gradient norms line by line.
LoRA has no dropout, which would draw other random numbers in each process. `micro_batch_of_…` is
the baseline: one process with another micro-batch size.
"""

import random
import shutil
from pathlib import Path
from typing import Any

from benchmarks.reliability.common import arguments, print_progress, record, workshop
from tests.support.small_runs import lora_settings, metrics, run_distributed, samples_seen

STEPS, BATCH = 60, 8
TOLERANCE = 1e-4
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "pretrain": ("pretrain", {"optim__muon_lr": 0.002}),
    "pretrain-muon-0.02": ("pretrain", {"optim__muon_lr": 0.02}),
    "pretrain-adamw": ("pretrain", {"optim__name": "adamw"}),
    "moe": ("pretrain", {"optim__muon_lr": 0.002, "model__preset": "nano-moe"}),
    "moe-muon-0.02": ("pretrain", {"optim__muon_lr": 0.02, "model__preset": "nano-moe"}),
    "sft": ("sft", {"optim__muon_lr": 0.002}),
    "sft-muon-0.02": ("sft", {"optim__muon_lr": 0.02}),
    "lora": ("sft", lora_settings(lora__dropout=0.0)),
    "dpo": ("dpo", {"optim__name": "adamw"}),
}


def main() -> None:
    """Run, stop, resume and compare; write the record."""
    args = arguments(__doc__ or "", 5)
    dice = random.Random(args.seed)
    metrics: dict[str, dict[str, Any]] = {}
    with workshop() as shop:
        for kind, (objective, more) in KINDS.items():
            settings = {"training__steps": STEPS, "training__global_batch_size": BATCH} | more

            def train(run: Path, processes: int, stop: tuple[int, int] | None = None) -> list[int]:
                run_distributed(shop.fork_server, run, processes, objective, stop=stop, **settings)  # noqa: B023
                return samples_seen(run, processes, BATCH)

            single = shop.folder / f"{kind}-1"
            expected = train(single, 1)
            assert expected == list(range(STEPS * BATCH))
            result = {"runs": 0, "stops": 0, "other_samples": 0, "worst_loss": 0.0}
            result |= {"worst_grad_norm": 0.0}
            for micro_batch in (2, 4):
                split = settings | {"training__micro_batch_size": micro_batch}
                run_distributed(shop.fork_server, shop.folder / "split", 1, objective, **split)
                result[f"micro_batch_of_{micro_batch}"] = largest_difference(
                    single, shop.folder / "split", "loss"
                )
                shutil.rmtree(shop.folder / "split")
            plans = [[2], [4], *(random_counts(dice) for _ in range(args.number))]
            for plan in plans:
                run, samples = shop.folder / "run", []
                for at, processes in enumerate(plan):
                    stop = None
                    if at + 1 < len(plan):
                        # Within the first third of the remaining micro-batches of one process.
                        calls = (STEPS * BATCH - len(samples)) // processes
                        stop = (dice.randrange(processes), dice.randrange(1, max(2, calls // 3)))
                        result["stops"] += 1
                    samples += train(run, processes, stop)
                result["runs"] += 1
                result["other_samples"] += samples != expected
                for name in ("loss", "grad_norm"):
                    worst = largest_difference(single, run, name)
                    result[f"worst_{name}"] = max(result[f"worst_{name}"], worst)
                shutil.rmtree(run)
                print_progress(result["runs"], len(plans), f"{kind} by {plan}")
            metrics[kind] = result | {"within": result["worst_loss"] < TOLERANCE}
    record("6 process counts", args, {"steps": STEPS, "kinds": metrics}, file="process-count")


def random_counts(dice: random.Random) -> list[int]:
    """Return five process counts out of 1, 2 and 4; neighbours differ."""
    counts: list[int] = []
    while len(counts) < 5:
        counts += [c for c in [dice.choice((1, 2, 4))] if not counts or c != counts[-1]]
    return counts


def largest_difference(run: Path, other: Path, name: str) -> float:
    """Return the largest relative difference of a metric of any step."""
    lines, others = metrics(run, "train"), metrics(other, "train")
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    return max(abs(a[name] - b[name]) / abs(a[name]) for a, b in zip(lines, others, strict=True))


if __name__ == "__main__":
    main()
