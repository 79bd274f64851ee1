"""Run everything that needs a GPU, in under ten minutes, and write a record of it.

    python -m benchmarks.gpu_report --texts FILES --chats FILES      (or: make gpu-report)
    python -m benchmarks.gpu_report --tiny --device cpu              rehearse it on a CPU

Each part runs in a separate process with a time limit. A part that fails or takes too long is
recorded with what it measured until then, and the others run. The record is rewritten after each
measurement: --out receives gpu-report.json, gpu-report.md, gpu-report.log and the reports of the
training runs. While the first parts use the GPU, the CPU trains a tokenizer and tokenizes the
texts.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import Context
from benchmarks.gpu.markdown import failures, render
from minimind.environment import num_cores

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class Part:
    """A part of the report: where its function is, and its time limit on a GPU."""

    function: str  # module:function, of a Context
    limit_s: int
    needs_texts: bool = False


# The last part trains for as long as the others leave time.
PARTS = {
    "doctor": Part("benchmarks.gpu_report:doctor", 45),
    "tests": Part("benchmarks.gpu_report:tests", 80),
    "capped": Part("benchmarks.gpu.training:run_capped", 35),
    "processes": Part("benchmarks.gpu.processes:run", 75),
    "profile": Part("benchmarks.gpu.training:run_profile", 35),
    "decoding": Part("benchmarks.gpu.decoding:run", 80),
    "training": Part("benchmarks.gpu.training:run", 140),
    "pretraining": Part("benchmarks.gpu.pretraining:run", 240, needs_texts=True),
}
_BACKGROUND = Part("benchmarks.gpu.pretraining:prepare", 500, needs_texts=True)


@dataclass(frozen=True)
class Running:
    """A part that was started, and when."""

    child: "subprocess.Popen[bytes]"
    started: float


def main() -> None:
    """Run the parts, or with --part one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", nargs="*", default=[], help="files to pretrain on")
    parser.add_argument("--chats", nargs="*", default=[], help="files to fine-tune on")
    parser.add_argument("--seconds", type=float, default=100.0, help="of pretraining")
    parser.add_argument("--limit", type=float, default=570.0, help="seconds for everything")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="sizes for a rehearsal on a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/records")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        module, _, function = (
            _BACKGROUND if args.part == "prepare" else PARTS[args.part]
        ).function.partition(":")
        run: Callable[[Context], None] = getattr(import_module(module), function)
        run(
            Context(
                args.part, args.work, args.device, args.tiny, args.texts, args.chats, args.seconds
            )
        )
        return
    signal.signal(signal.SIGTERM, lambda *rest: sys.exit("terminated"))
    with tempfile.TemporaryDirectory(prefix="gpu-report-") as work:
        args.work = Path(work)
        Report(args).run()


class Report:
    """Runs the parts one after the other, and keeps the record on disk up to date."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.started = args, time.monotonic()
        self.out: Path = args.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = (self.out / "gpu-report.log").open("w", encoding="utf-8")
        self.record: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python", "-m", "benchmarks.gpu_report", *sys.argv[1:]]),
            "machine": machine(),
            "parts": {},
        }

    def run(self) -> None:
        """Run every part, then say where the record is."""
        background = None
        if self.args.texts and "pretraining" in self.args.parts:
            threads = str(max(1, num_cores() // 2))  # the other parts are timed meanwhile
            variables = {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
            background = self.start("prepare", variables | {"CUDA_VISIBLE_DEVICES": ""})
        try:
            for name in self.args.parts:
                part = PARTS[name]
                if part.needs_texts and not self.args.texts:
                    continue
                if part.needs_texts and background is not None:
                    self.follow("prepare", background, _BACKGROUND.limit_s)
                    background = None
                if self.time_left() > 10:
                    seconds = pretraining_seconds(self.args.seconds, self.time_left())
                    running = self.start(name, {}, "--seconds", str(seconds))
                    self.follow(name, running, part.limit_s)
                else:
                    self.record["parts"][name] = {"status": "skipped: no time left"}
        finally:
            if background is not None:
                stop(background.child)
            self.write()
            for report in self.args.work.glob("*-report.html"):
                shutil.copy(report, self.out / f"gpu-{report.name}")
            self.log.close()
        print(f"The record: {self.out / 'gpu-report.md'}")

    def time_left(self) -> float:
        return float(self.args.limit) - (time.monotonic() - self.started)

    def start(self, name: str, variables: dict[str, str], *options: str) -> Running:
        """Start a part in a new process group."""
        command = [sys.executable, "-m", "benchmarks.gpu_report", *sys.argv[1:], *options]
        command += ["--part", name, "--work", str(self.args.work)]
        log = (self.args.work / f"{name}.log").open("wb")
        started = time.monotonic()
        with log:
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | variables,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Running(child, started)

    def follow(self, name: str, running: Running, limit_s: float) -> None:
        """Wait for a part, update the record meanwhile, and end it after its time."""
        child, started = running.child, running.started
        limit_s *= 4 if self.args.device == "cpu" else 1
        limit_s = min(limit_s, time.monotonic() - started + self.time_left())
        status = ""
        try:
            while child.poll() is None:
                if time.monotonic() - started > limit_s:
                    status = f"stopped after {limit_s:.0f} s"
                    break
                self.update(name, "running", started)
                time.sleep(0.5)
        finally:
            stop(child)
            status = status or ("done" if child.returncode == 0 else f"exit {child.returncode}")
            self.update(name, status, started)
            text = (self.args.work / f"{name}.log").read_text("utf-8", errors="replace")
            self.log.write(f"\n=== {name}: {status}\n{text}")
            self.log.flush()
        part = self.record["parts"][name]
        print(f"{name}: {status}, {part['seconds']:.0f} s", *failures(part), flush=True)
        if status != "done":
            print(text[-1500:], flush=True)

    def update(self, name: str, status: str, started: float) -> None:
        """Copy the results of a part into the record."""
        results: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            results = json.loads((self.args.work / f"{name}.json").read_text("utf-8"))
        seconds = round(time.monotonic() - started, 1)
        before = self.record["parts"].get(name, {})
        self.record["parts"][name] = {"status": status, "seconds": seconds} | results
        if status != "running" or any(before.get(k) != v for k, v in results.items()):
            self.write()

    def write(self) -> None:
        """Write the record as JSON and as Markdown."""
        for name, text in (
            ("gpu-report.json", json.dumps(self.record, ensure_ascii=False, indent=1) + "\n"),
            ("gpu-report.md", render(self.record)),
        ):
            temporary = self.out / f"{name}.tmp"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.out / name)


def stop(child: "subprocess.Popen[bytes]") -> None:
    """End a part and the processes that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def pretraining_seconds(requested: float, time_left: float) -> float:
    """Return the duration of pretraining that leaves time for fine-tuning and answers."""
    return min(requested, max(20.0, (time_left - 60) / 1.6))


def machine() -> dict[str, Any]:
    """Describe the GPU, the driver and the versions of packages."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu_cores": os.cpu_count(),
    }
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            facts[package] = version(package)
    with contextlib.suppress(OSError):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"]
        done = subprocess.run(query, capture_output=True, text=True)
        facts["gpu"] = done.stdout.strip().splitlines()[1:]
    with contextlib.suppress(OSError):
        commit = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        done = subprocess.run(commit, capture_output=True, text=True)
        facts["commit"] = done.stdout.strip()
    return facts


def doctor(context: Context) -> None:
    """Run `minimind doctor`, and try variable-length attention."""
    import torch

    from minimind.model import varlen

    chosen = torch.device(context.device)
    if chosen.type == "cuda":
        context.measure("varlen error", lambda: varlen.max_difference_from_mask(chosen))
        context.measure("NCCL", lambda: list(torch.cuda.nccl.version()))
    output = context.work / "doctor-output.json"
    command = [sys.executable, "-m", "minimind", "doctor", "--device", context.device]
    context.run_command([*command, "--json", str(output)])
    if output.is_file():
        context.save("json", json.loads(output.read_text("utf-8")))


def tests(context: Context) -> None:
    """Run the tests that are marked `gpu`."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-rfEs", "--tb=short"]
    command += ["-o", "filterwarnings=default", "-p", "no:cacheprovider", "--durations=5"]
    # Only their files are collected: others import packages that a GPU machine may lack.
    files = (ROOT / "tests").rglob("test_*.py")
    command += sorted(str(file) for file in files if "mark.gpu" in file.read_text("utf-8"))
    context.run_command(command)


if __name__ == "__main__":
    main()
