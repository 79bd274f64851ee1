"""Side-by-side measurements: contenders in separate processes, measured in turns.

A shared machine changes its speed within minutes, so a speed means little alone, and the ratio of
two speeds means something only if both were measured at nearly the same time. Here every contender
is a process that stays alive (its memory and its thread pools are its own) and measures once per
request. Measurements begin when all processes are ready. In each round all contenders measure one
after the other, and every second round reverses their order. A contender that fails is left out.
Results are medians with minimum and maximum; a ratio is the median of the ratios within each round.
A contender can run the code of another checkout.
"""

import argparse
import contextlib
import gc
import importlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.markdown import table

Metrics = Mapping[str, float]
Rounds = Mapping[str, Sequence[Metrics]]
Summary = dict[str, dict[str, dict[str, float]]]

ROOT = Path(__file__).resolve().parents[1]


def add_options(parser: argparse.ArgumentParser, *, rounds: int = 3, threads: int = 2) -> None:
    """Add the options that every side-by-side measurement has."""
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, one round: a trial")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)


@dataclass(frozen=True)
class Contender:
    """A program to measure: `python -m module arguments`, which calls `answer_requests`.

    checkout: the code that it measures, this one if None; see `use_checkout`.
    """

    name: str
    module: str
    arguments: Sequence[str]
    checkout: Path | None = None

    def command(self) -> list[str]:
        """Return the command line. A checkout's own environment is used if it has one."""
        python = sys.executable
        if self.checkout and (own := self.checkout / ".venv/bin/python").exists():
            python = str(own)
        # -P: the current folder is not on the module path.
        return [python, "-P", "-m", self.module, *self.arguments, "--contender", self.name]


def this_script(args: argparse.Namespace, name: str, checkout: Path | None = None) -> Contender:
    """Return a contender that the running script measures itself, with its own arguments."""
    return Contender(name, _module(), [*sys.argv[1:], "--work", str(args.work)], checkout)


def _module() -> str:
    return f"benchmarks.{Path(sys.argv[0]).stem}"


class _FailedError(Exception):
    """The process of a contender ended."""


class _Process:
    """A contender's process."""

    def __init__(self, contender: Contender, threads: int, log: IO[bytes]) -> None:
        self.name, self._log = contender.name, log
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self.child = subprocess.Popen(
            contender.command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
        )

    def wait_until_ready(self) -> None:
        """Wait for the end of the start-up, which would slow a measurement beside it."""
        self._read()

    def measure(self) -> dict[str, float]:
        """Request one measurement and wait for it."""
        assert self.child.stdin
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.write("measure\n")
            self.child.stdin.flush()
        metrics: dict[str, float] = json.loads(self._read())
        return metrics

    def _read(self) -> str:
        """Return the next line. Raises _FailedError with the log if the process has ended."""
        assert self.child.stdout
        if answer := self.child.stdout.readline():
            return answer
        self._log.seek(0)
        log = self._log.read().decode(errors="replace")
        raise _FailedError(f"{self.name} failed with status {self.child.wait()}:\n{log[-3000:]}")

    def close(self) -> None:
        """End the process, which has nothing to save."""
        self.child.kill()
        self.child.communicate()


def measure_in_turns(
    contenders: Sequence[Contender], rounds: int, threads: int, work: Path
) -> dict[str, list[dict[str, float]]]:
    """Return the metrics of every contender in every round; `work` receives their logs.

    A contender that fails is reported and left out. Exits if none is left.
    """
    measured: dict[str, list[dict[str, float]]] = {one.name: [] for one in contenders}
    with contextlib.ExitStack() as stack:
        processes = []
        for number, contender in enumerate(contenders):
            log = stack.enter_context((work / f"contender-{number}.log").open("w+b"))
            processes.append(_Process(contender, threads, log))
            stack.callback(processes[-1].close)

        def left_out(process: _Process, error: _FailedError) -> None:
            processes.remove(process)
            del measured[process.name]
            if not processes:
                sys.exit(str(error))
            print(f"{error}\n{process.name} is left out.", file=sys.stderr, flush=True)

        for process in list(processes):
            try:
                process.wait_until_ready()
            except _FailedError as error:
                left_out(process, error)
        for number in range(rounds):
            for process in processes[::-1] if number % 2 else processes[:]:
                try:
                    metrics = process.measure()
                except _FailedError as error:
                    left_out(process, error)
                    continue
                measured[process.name].append(metrics)
                shown = ", ".join(f"{key} {value:,.4g}" for key, value in metrics.items())
                print(f"{number + 1}/{rounds} {process.name}: {shown}", file=sys.stderr, flush=True)
    return measured


def use_checkout(checkout: Path | None) -> None:
    """Import minimind from another checkout from now on. Exits if another one is imported."""
    if checkout is None:
        return
    sys.path.insert(0, str(checkout))
    file = importlib.import_module("minimind").__file__
    if file is None or checkout.resolve() not in Path(file).resolve().parents:
        sys.exit(f"{checkout} has no package minimind; imported {file} instead")


def answer_requests(measure: Callable[[], Mapping[str, float]]) -> None:
    """Report readiness, then measure once per line of standard input and print the metrics as JSON.

    The peak memory of the process is added as `peak_mb`, unless it has been measured. What the
    measured code prints goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        metrics = measure()
        print(json.dumps({"peak_mb": peak_mb()} | dict(metrics)), file=answers, flush=True)
        gc.collect()  # the memory of this measurement is not held during those of others


def peak_mb() -> float:
    """Return the peak resident memory of this process in MB, 0 where Linux does not report it.

    Not `ru_maxrss`, which includes that of the parent process before the program was loaded.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text("ascii").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    return 0.0


def clocked(work: Callable[[], object], device: Any) -> tuple[float, float]:
    """Return the wall-clock and the CPU seconds of `work`, with the device idle at both ends."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start, cpu_start = time.perf_counter(), time.process_time()
    work()
    wait()
    return time.perf_counter() - start, time.process_time() - cpu_start


def over_rounds(rounds: Rounds) -> Summary:
    """Return median, minimum and maximum over the rounds of each metric of each contender."""
    return {
        name: {key: _summarize([metrics[key] for metrics in measured]) for key in measured[0]}
        for name, measured in rounds.items()
    }


def ratios(rounds: Rounds, metric: str, reference: str) -> dict[str, dict[str, float]]:
    """Return how many times the metric of the reference is that of each contender, by round."""
    return {
        name: _summarize(
            [
                own[metric] / other[metric]
                for own, other in zip(rounds[reference], measured, strict=True)
            ]
        )
        for name, measured in rounds.items()
        if metric in measured[0]
    }


def _summarize(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread(metric: Mapping[str, float], decimals: int = 0) -> str:
    """Format minimum and maximum as "2,700-2,835"."""
    return f"{metric['min']:,.{decimals}f}-{metric['max']:,.{decimals}f}"


def comparison(
    rounds: Rounds, columns: Mapping[str, tuple[str, int]], *, metric: str, reference: str
) -> list[str]:
    """Return the lines of a Markdown table with a row per contender.

    columns: title and decimals by metric. The last column is the metric of the reference divided
    by that of the contender.
    """
    summary, times = over_rounds(rounds), ratios(rounds, metric, reference)
    rows = []
    for name, metrics in summary.items():
        cells = [
            f"{metrics[key]['median']:,.{digits}f} ({spread(metrics[key], digits)})"
            if key in metrics
            else ""
            for key, (_, digits) in columns.items()
        ]
        ratio = f"{times[name]['median']:.2f} ({spread(times[name], 2)})" if name in times else ""
        rows.append([name, *cells, ratio])
    titles = [title for title, _ in columns.values()]
    return table(["contender", *titles, f"{reference} is faster by"], rows)


def machine(*packages: str) -> str:
    """Describe this machine: processor, cores, torch and other packages."""
    from importlib.metadata import version

    import torch

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        model = next((x.split(": ")[1] for x in lines if x.startswith("model name")), model)
    flags = torch.backends.cpu.get_cpu_capability()
    versions = [f"torch {torch.__version__}", *(f"{name} {version(name)}" for name in packages)]
    return ", ".join([f"{os.cpu_count()} cores", model, flags, *versions])


@contextlib.contextmanager
def recording(args: argparse.Namespace, *packages: str) -> Iterator[dict[str, Any]]:
    """Yield a record with date, machine, command and load; write it after the block.

    The block adds `markdown`, the lines of a table, which are printed with these facts.
    """
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(*packages),
        "threads": args.threads,
        "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
        "load_before": os.getloadavg(),
    }
    yield record
    record["load_after"] = os.getloadavg()
    before, after = record["load_before"][0], record["load_after"][0]
    facts = f"{record['date']}, {record['machine']}, OMP_NUM_THREADS={args.threads}"
    print("\n".join(record.pop("markdown")))
    print(f"\n`{record['command']}`, {facts}, load average {before:.1f} to {after:.1f}.")
    if args.json:
        args.json.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", "utf-8")
