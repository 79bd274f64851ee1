"""100 stops by SIGTERM or Ctrl-C at random moments; each third with a second signal.

    python benchmarks/reliability/signals.py [--number 100]

After the first signal, `minimind train` saves and exits with status 130 within 10 s; after a second
it exits at once. The same command then resumes the run. The finished run is compared bit by bit
with an uninterrupted one.
"""

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.reliability.common import arguments, print_progress, record, workshop
from tests.support.small_runs import steps_done, wait_until
from tests.support.stages import INTERRUPTED, KINDS, STEPS, assert_same

LIMIT_S = 10.0
STOPS = 4  # per run


def has_reached(run: Path, log_every: int, step: int) -> Callable[[], bool]:
    """Return a condition: the resumed run has reached a step, and done at least one more."""
    before = steps_done(run)
    return lambda: steps_done(run) >= max(step // log_every, before + 1)


def main() -> None:
    """Stop, resume and compare runs; write the record."""
    args = arguments(__doc__ or "", 100)
    dice = random.Random(args.seed)
    took: dict[str, list[float]] = {"SIGINT": [], "SIGTERM": [], "a second one": []}
    runs = different = late = 0
    with workshop() as shop:
        while (done := sum(map(len, took.values()))) < args.number:
            stage = shop.stage(KINDS[runs % len(KINDS)])
            run = shop.folder / "run"
            command = stage.arguments(run)
            for step in sorted(dice.sample(range(1, STEPS - 30), STOPS)):
                child = shop.fork_server.start(
                    "minimind", arguments=command, signals={}, pause_s=0.02
                )
                wait_until(has_reached(run, stage.overrides.get("training__log_every", 1), step))
                time.sleep(dice.uniform(0, 0.05))
                number = dice.choice([signal.SIGINT, signal.SIGTERM])
                twice = sum(map(len, took.values())) % 3 == 2
                began = time.perf_counter()
                os.kill(child.pid, number)
                if twice:
                    time.sleep(dice.uniform(0, 0.002))
                    with contextlib.suppress(ProcessLookupError):  # it has already exited
                        os.kill(child.pid, dice.choice([signal.SIGINT, signal.SIGTERM]))
                status = child.wait()
                seconds = time.perf_counter() - began
                # The second signal may arrive after the handlers of the training loop were removed.
                assert status == INTERRUPTED or (twice and status), (
                    shop.fork_server.output.read_text()
                )
                took["a second one" if twice else number.name].append(seconds)
                late += seconds > LIMIT_S
            stage.finish(run)
            runs += 1
            try:
                assert_same(run, stage.uninterrupted)
            except AssertionError as error:
                different += 1
                print(f"{stage.objective}: {error}", flush=True)
            shutil.rmtree(run)
            print_progress(done + STOPS, args.number)
    seconds = {
        name: {"stops": len(all_s), "median_s": median(all_s), "most_s": max(all_s)}
        for name, all_s in took.items()
    }
    metrics = {"stops": sum(map(len, took.values())), "later_than_10_s": late}
    metrics |= {"runs": runs, "different": different, "seconds": seconds}
    record("3 signals", args, metrics)


if __name__ == "__main__":
    main()
