"""The disk fills up at 50 offsets of a save; older checkpoints stay intact.

    python benchmarks/reliability/full_disk.py [--number 50]      (as root: it mounts a small tmpfs)

A run on its own tmpfs saves its first checkpoints. From step 15 on, as soon as a save starts to
write (after the check of free space), the disk is filled up to a given number of free bytes. The
run must end with a ResourceError that states the bytes, and leave no incomplete directory. After
space is freed, it must resume and end with the same bits as an uninterrupted run.
"""

import random
import re
import shutil
import subprocess

from benchmarks.reliability.common import arguments, print_progress, record, workshop
from minimind.training.checkpoint import inspect_checkpoints
from tests.support.small_runs import REFUSED
from tests.support.stages import KINDS, assert_same, saved_steps

DISK = 64 << 20


def main() -> None:
    """Fill the disk, check the error, resume and compare; write the record."""
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
                newest = (
                    stage.uninterrupted
                    / "checkpoints"
                    / f"step-{saved_steps(stage.uninterrupted)[-1]:08}"
                )
                size = sum(file.stat().st_size for file in newest.iterdir())
                # Offsets are spread evenly over the checkpoint, with random jitter.
                room = int(size * (number + dice.random()) / args.number)
                options = {"settings": stage.settings(run), "room": room, "step": 15}
                status = shop.fork_server.run("train_on_a_disk_that_fills", **options)
                output = shop.fork_server.output.read_text()
                assert status == REFUSED, (status, room, output)
                pattern = r"could not be written \(.*\); it needs [\d,]+ bytes and [\d,]+ are free"
                count["refused"] += bool(re.search(pattern, output))
                checkpoints = inspect_checkpoints(run, verify_hashes=True)
                count["damaged"] += sum(bool(c.error) for c in checkpoints)
                count["damaged"] += len(checkpoints) < 2
                count["left_over"] += len(list((run / "checkpoints").glob(".tmp-*")))
                (disk / "ballast").unlink()
                stage.finish(run)
                try:
                    assert_same(run, stage.uninterrupted)
                except AssertionError as error:
                    count["different"] += 1
                    print(f"{stage.objective} at {room}: {error}", flush=True)
                shutil.rmtree(run)
                count["offsets"] += 1
                print_progress(number + 1, args.number, f"{room:,} bytes of {size:,}")
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    record("5 full disk", args, count)


if __name__ == "__main__":
    main()
