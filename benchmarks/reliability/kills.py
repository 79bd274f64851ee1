"""300 random SIGKILLs in five kinds of stages; the results are bit-identical.

    python benchmarks/reliability/kills.py [--number 300]

Each run of 60 steps, which saves every 7 and validates every 10, is killed at ten random steps,
up to 50 ms after each, and resumed. At the end it is compared with an uninterrupted run: weights,
moments and random states of the last checkpoint, weights of the model or adapter, every line of
metrics.jsonl, and the steps of the kept checkpoints.
"""

import random
import shutil
from itertools import cycle

from benchmarks.reliability.common import arguments, print_progress, record, workshop
from tests.support.stages import KINDS, assert_same, kill_repeatedly

KILLS = 10  # per run


def main() -> None:
    """Kill and compare runs; write the record."""
    args = arguments(__doc__ or "", 300)
    dice = random.Random(args.seed)
    counts = {kind: {"kills": 0, "in_a_save": 0, "runs": 0, "different": 0} for kind in KINDS}
    with workshop() as shop:
        done = 0
        for kind in cycle(KINDS):
            if done >= args.number:
                break
            stage, run = shop.stage(kind), shop.folder / "run"
            count = counts[kind]
            count["in_a_save"] += kill_repeatedly(stage, run, dice, KILLS)
            count["kills"] += KILLS
            count["runs"] += 1
            try:
                assert_same(run, stage.uninterrupted)
            except AssertionError as error:
                count["different"] += 1
                print(f"{kind}: {error}", flush=True)
            shutil.rmtree(run)
            done += KILLS
            print_progress(done, args.number, kind)
    total = {key: sum(count[key] for count in counts.values()) for key in counts[KINDS[0]]}
    record("1 kills", args, {"total": total, "by_kind": counts})


if __name__ == "__main__":
    main()
