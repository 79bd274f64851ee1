"""Row 4: 1,000 flipped bits and 200 cuts; each is noticed, and the checkpoint before is taken.

    python benchmarks/reliability/flips.py [--number 1000]

Of the newest checkpoint of a real run: a random file of the four, a random bit of it.
"""

import random

from benchmarks.reliability.common import arguments, record, said, workshop
from minimind.training.checkpoint import Checkpoint, latest_checkpoint


def main() -> None:
    """Flip, load, record."""
    args = arguments(__doc__ or "", 1000)
    dice = random.Random(args.seed)
    with workshop() as shop:
        run = shop.stage("pretrain").whole
        heard: list[str] = []

        def load() -> Checkpoint:
            heard.clear()
            found = latest_checkpoint(run, warn=heard.append)
            assert found is not None
            return found

        whole = load()
        files = sorted(whole.path.iterdir())
        metrics: dict[str, dict[str, int]] = {}
        for kind, number in (("flips", args.number), ("cuts", args.number // 5)):
            count = {"made": 0, "noticed_and_named": 0, "loaded_all_the_same": 0}
            for _ in range(number):
                file = dice.choice(files)
                content = file.read_bytes()
                spoilt = bytearray(content)
                if kind == "flips":
                    bit = dice.randrange(8 * len(content))
                    spoilt[bit // 8] ^= 1 << bit % 8
                else:
                    del spoilt[dice.randrange(len(content)) :]
                file.write_bytes(spoilt)
                found = load()
                count["made"] += 1
                count["loaded_all_the_same"] += found.step == whole.step
                named = len(heard) == 1 and str(whole.path) in heard[0]
                count["noticed_and_named"] += found.step < whole.step and named
                file.write_bytes(content)
                if count["made"] % 100 == 0:
                    said(count["made"], number, kind)
            metrics[kind] = count
        assert load().step == whole.step
        sizes = {file.name: file.stat().st_size for file in files}
    record("4 flips", args, metrics | {"bytes": sizes})


if __name__ == "__main__":
    main()
