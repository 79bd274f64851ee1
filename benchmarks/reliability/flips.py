"""1,000 flipped bits and 200 truncated files in a checkpoint.

    python benchmarks/reliability/flips.py [--number 1000]

Each fault is in a random file of the newest checkpoint of a run. It must be reported, and the
previous checkpoint must be loaded.
"""

import random

from benchmarks.reliability.common import arguments, print_progress, record, workshop
from minimind.training.checkpoint import Checkpoint, latest_checkpoint


def main() -> None:
    """Damage, load and restore a checkpoint repeatedly; write the record."""
    args = arguments(__doc__ or "", 1000)
    dice = random.Random(args.seed)
    with workshop() as shop:
        run = shop.stage("pretrain").uninterrupted
        warnings: list[str] = []

        def load() -> Checkpoint:
            warnings.clear()
            loaded = latest_checkpoint(run, warn=warnings.append)
            assert loaded is not None
            return loaded

        intact = load()
        files = sorted(intact.path.iterdir())
        metrics: dict[str, dict[str, int]] = {}
        for kind, number in (("flips", args.number), ("cuts", args.number // 5)):
            count = {"made": 0, "noticed_and_named": 0, "loaded_all_the_same": 0}
            for _ in range(number):
                file = dice.choice(files)
                content = file.read_bytes()
                damaged = bytearray(content)
                if kind == "flips":
                    bit = dice.randrange(8 * len(content))
                    damaged[bit // 8] ^= 1 << bit % 8
                else:
                    del damaged[dice.randrange(len(content)) :]
                file.write_bytes(damaged)
                loaded = load()
                count["made"] += 1
                count["loaded_all_the_same"] += loaded.step == intact.step
                named = len(warnings) == 1 and str(intact.path) in warnings[0]
                count["noticed_and_named"] += loaded.step < intact.step and named
                file.write_bytes(content)
                if count["made"] % 100 == 0:
                    print_progress(count["made"], number, kind)
            metrics[kind] = count
        assert load().step == intact.step
        sizes = {file.name: file.stat().st_size for file in files}
    record("4 flips", args, metrics | {"bytes": sizes})


if __name__ == "__main__":
    main()
