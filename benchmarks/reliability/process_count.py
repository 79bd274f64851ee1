"""Row 6: a run goes on with 1, 2 and 4 processes in turn: the same samples, losses within 1e-4.

    python benchmarks/reliability/process_count.py [--number 5]

Of each kind of stage, 60 steps of 8 windows with one process that nothing interrupts are compared
with as many runs as --number says, each stopped four times, by a signal to a random process at a
random place, and gone on with by another number of processes each time; and with runs of 2 and of
4 processes from the beginning to the end. Samples are compared by number and order, losses and
norms of gradients line by line. LoRA is without dropout, which draws other numbers in each process.
`micro_batch_of_…` is what no number of processes is to blame for: one process against itself, with
its batches split into other parts.
"""

import random
import shutil
from pathlib import Path
from typing import Any

from benchmarks.reliability.common import arguments, record, said, workshop
from tests.support.small_runs import lora_settings, metrics, run_distributed, samples_seen

STEPS, BATCH = 60, 8
CLOSE = 1e-4
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
    """Run, stop, go on, compare, record."""
    args = arguments(__doc__ or "", 5)
    dice = random.Random(args.seed)
    metrics: dict[str, dict[str, Any]] = {}
    with workshop() as shop:
        for kind, (objective, more) in KINDS.items():
            settings = {"training__steps": STEPS, "training__global_batch_size": BATCH} | more

            def go(run: Path, processes: int, stop: tuple[int, int] | None = None) -> list[int]:
                run_distributed(shop.lives, run, processes, objective, stop=stop, **settings)  # noqa: B023
                return samples_seen(run, processes, BATCH)

            whole = shop.folder / f"{kind}-1"
            wanted = go(whole, 1)
            assert wanted == list(range(STEPS * BATCH))
            figure = {"runs": 0, "stops": 0, "other_samples": 0, "worst_loss": 0.0}
            figure |= {"worst_grad_norm": 0.0}
            for micro_batch in (2, 4):
                split = settings | {"training__micro_batch_size": micro_batch}
                run_distributed(shop.lives, shop.folder / "split", 1, objective, **split)
                figure[f"micro_batch_of_{micro_batch}"] = farthest(
                    whole, shop.folder / "split", "loss"
                )
                shutil.rmtree(shop.folder / "split")
            plans = [[2], [4], *(changes(dice) for _ in range(args.number))]
            for plan in plans:
                run, seen = shop.folder / "run", []
                for at, processes in enumerate(plan):
                    stop = None
                    if at + 1 < len(plan):
                        # About a quarter of what is left to do, in micro-batches of one process.
                        calls = (STEPS * BATCH - len(seen)) // processes
                        stop = (dice.randrange(processes), dice.randrange(1, max(2, calls // 3)))
                        figure["stops"] += 1
                    seen += go(run, processes, stop)
                figure["runs"] += 1
                figure["other_samples"] += seen != wanted
                for name in ("loss", "grad_norm"):
                    worst = farthest(whole, run, name)
                    figure[f"worst_{name}"] = max(figure[f"worst_{name}"], worst)
                shutil.rmtree(run)
                said(figure["runs"], len(plans), f"{kind} by {plan}")
            metrics[kind] = figure | {"within": figure["worst_loss"] < CLOSE}
    record("6 process counts", args, {"steps": STEPS, "kinds": metrics}, file="process-count")


def changes(dice: random.Random) -> list[int]:
    """Five times 1, 2 or 4, each another than the one before."""
    counts: list[int] = []
    while len(counts) < 5:
        counts += [c for c in [dice.choice((1, 2, 4))] if not counts or c != counts[-1]]
    return counts


def farthest(run: Path, other: Path, name: str) -> float:
    """Largest difference of a figure of any step, as a share of it."""
    lines, others = metrics(run, "train"), metrics(other, "train")
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    return max(abs(a[name] - b[name]) / abs(a[name]) for a, b in zip(lines, others, strict=True))


if __name__ == "__main__":
    main()
