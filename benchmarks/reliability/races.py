"""Two `minimind train` start in one directory at the same moment, 50 times.

    python benchmarks/reliability/races.py [--number 50]

One trains; the other must report the process that holds the run, and change nothing. In every
second race the directory has the lock file of a killed process. The result is compared bit by bit
with a run without a race.
"""

import contextlib
import os
import random
import re
import shutil
import signal

from benchmarks.reliability.common import arguments, print_progress, record, workshop
from tests.support.small_runs import ForkServer
from tests.support.stages import assert_same


def main() -> None:
    """Run and compare races; write the record."""
    args = arguments(__doc__ or "", 50)
    dice = random.Random(args.seed)
    count = {"races": 0, "one_refused": 0, "holder_named": 0, "both_ran": 0, "different": 0}
    with workshop() as shop, contextlib.closing(ForkServer(shop.folder / "other")) as other:
        stage, run = shop.stage("pretrain"), shop.folder / "run"
        both = [shop.fork_server, other]
        for number in range(args.number):
            if number % 2:
                run.mkdir()
                killed = shop.fork_server.start("hold", run=run)
                killed.wait_for("held")
                os.kill(killed.pid, signal.SIGKILL)
                killed.wait()
            dice.shuffle(both)
            command = stage.arguments(run)
            racers = [
                fork_server.start("minimind", arguments=command, signals={}) for fork_server in both
            ]
            statuses = [racer.wait() for racer in racers]
            outputs = [fork_server.output.read_text() for fork_server in both]
            count["races"] += 1
            count["both_ran"] += statuses == [0, 0]
            if sorted(statuses) == [0, 1]:
                loser = statuses.index(1)
                count["one_refused"] += f"error: {run} is in use by" in outputs[loser]
                holder = re.search(r"in use by process (\d+) on \S+ since ", outputs[loser])
                winner = racers[1 - loser].pid
                count["holder_named"] += holder is not None and int(holder[1]) == winner
            try:
                assert_same(run, stage.uninterrupted)
            except AssertionError as error:
                count["different"] += 1
                print(f"{statuses}: {error}", flush=True)
            shutil.rmtree(run)
            print_progress(number + 1, args.number)
    record("10 races", args, count)


if __name__ == "__main__":
    main()
