"""Speed, memory and result of `minimind data prepare`.

    python benchmarks/data_preparation.py DATA… [--tokenizer DIR] [--workers 2] [--json FILE]

The command runs as a user would run it, without and (if given) with a tokenizer. Wall-clock time
depends on what else the machine does; CPU time, the sum over all processes, hardly does. Memory is
the largest sum of the resident memory of all processes, sampled four times a second; pages that
processes share count once for each.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any


def main() -> None:
    """Run the command, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", nargs="+")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--memory", type=float, default=1.0)
    parser.add_argument("--decontaminate", action="append", default=[])
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    common = ["--workers", str(args.workers), "--memory", str(args.memory)]
    runs = {"text": common}
    if args.decontaminate:
        names = [f"--decontaminate={name}" for name in args.decontaminate]
        runs["text, decontaminated"] = common + names
    if args.tokenizer:
        runs["text and tokens"] = [*common, "--tokenizer", str(args.tokenizer)]
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load_before": os.getloadavg(),
        "workers": args.workers,
        "runs": {name: measure(args.data, options) for name, options in runs.items()},
        "load_after": os.getloadavg(),
    }
    print(json.dumps(record, indent=1))
    if args.json:
        args.json.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def measure(data: list[str], options: list[str]) -> dict[str, Any]:
    """Run one preparation; return its times, memory and counts."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "minimind", "data", "prepare", *data, "--out", str(out)]
        start, cpu_start = time.monotonic(), _children_cpu()
        process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
        peak = peak_workers = 0
        while process.poll() is None:
            sizes = _tree_bytes(process.pid)
            peak, peak_workers = max(peak, sum(sizes)), max(peak_workers, *sizes[1:], 0, 0)
            time.sleep(0.25)
        wall, cpu = time.monotonic() - start, _children_cpu() - cpu_start
        if process.returncode:
            sys.exit(f"the command failed with status {process.returncode}")
        manifest = json.loads((out / "manifest.json").read_text("utf-8"))
        stored = sum(path.stat().st_size for path in (out / "text").iterdir())
    megabytes = manifest["input_text_bytes"] / 1e6
    return {
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "mb": round(megabytes, 1),
        "mb_per_wall_s": round(megabytes / wall, 2),
        "mb_per_cpu_s": round(megabytes / cpu, 2),
        "peak_mb": round(peak / 1e6),
        "peak_mb_of_a_worker": round(peak_workers / 1e6),
        "input_documents": manifest["input_documents"],
        "documents": manifest["documents"],
        "kept_mb": round(manifest["text_bytes"] / 1e6, 1),
        "compressed_mb": round(stored / 1e6, 1),
        "tokens": manifest["tokens"],
        "dropped": {name: entry["documents"] for name, entry in manifest["dropped"].items()},
    }


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _tree_bytes(pid: int) -> list[int]:
    """Return the resident memory of a process and its descendants, the process first."""
    sizes = []
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        sizes.append(pages * resource.getpagesize())
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):  # it has just ended
        return sizes
    for child in children:
        sizes += _tree_bytes(int(child))
    return sizes


if __name__ == "__main__":
    main()
