"""Row 5: the disk is full at 50 offsets of a save; older checkpoints stay whole, the run goes on.

    python benchmarks/reliability/full_disk.py [--number 50]      (as root: it mounts a small tmpfs)

A run on a tmpfs of its own saves its first checkpoints. From step 15 on, as soon as a save has
begun to write (so that the check of free space has passed), everything is filled up but for so
many bytes. The run must end with a ResourceError that names the bytes, leave no half-written
directory, and with room again end with the bits of a run that had room all along.
"""

import random
import re
import shutil
import subprocess

from benchmarks.reliability.common import arguments, record, said, workshop
from minimind.training.checkpoint import inspect_checkpoints
from tests.support.small_runs import REFUSED
from tests.support.stages import KINDS, assert_same, saved_steps

DISK = 64 << 20


def main() -> None:
    """Fill, look, go on, compare, record."""
    args = arguments(__doc__ or "", 50)
    dice = random.Random(args.seed)
    count = {"offsets": 0, "refused": 0, "damaged": 0, "left_over": 0, "different": 0}
    with workshop() as shop:
        disk = shop.folder / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(disk)]
        subprocess.run(mount, check=True)
        try:
            for number in range(args.number):
                stage = shop.stage(KINDS[number % len(KINDS)])
                run = disk / "run"
                newest = stage.whole / "checkpoints" / f"step-{saved_steps(stage.whole)[-1]:08}"
                size = sum(file.stat().st_size for file in newest.iterdir())
                # Evenly over all of it, and a random bit further.
                room = int(size * (number + dice.random()) / args.number)
                options = {"settings": stage.settings(run), "room": room, "step": 15}
                status = shop.lives.run("train_on_a_disk_that_fills", **options)
                told = shop.lives.output.read_text()
                assert status == REFUSED, (status, room, told)
                pattern = r"could not be written \(.*\); it needs [\d,]+ bytes and [\d,]+ are free"
                count["refused"] += bool(re.search(pattern, told))
                there = inspect_checkpoints(run, verify_hashes=True)
                count["damaged"] += sum(bool(one.error) for one in there) + (len(there) < 2)
                count["left_over"] += len(list((run / "checkpoints").glob(".tmp-*")))
                (disk / "ballast").unlink()
                stage.finish(run)
                try:
                    assert_same(run, stage.whole)
                except AssertionError as error:
                    count["different"] += 1
                    print(f"{stage.objective} at {room}: {error}", flush=True)
                shutil.rmtree(run)
                count["offsets"] += 1
                said(number + 1, args.number, f"{room:,} bytes of {size:,}")
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    record("5 full disk", args, count)


if __name__ == "__main__":
    main()
