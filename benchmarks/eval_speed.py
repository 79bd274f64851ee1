"""Time of `minimind eval` for the 1,346 questions of C-Eval, in each prompt style.

    python benchmarks/eval_speed.py --data DIR --tokenizer DIR [--preset small] [--json FILE]

The weights are random, because the time does not depend on them. `--data` holds C-Eval, and
`--tokenizer` a tokenizer of the preset's size, which determines the number of tokens. The time is
that of the complete command, including loading and writing. CPU seconds, summed over all cores, are
recorded too, because other work on the machine affects them less.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

STYLES = (("chat", 0), ("letter", 0), ("letter", 5), ("answer", 0))


def main() -> None:
    """Measure each prompt style, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        parameters, context = prepare(args.preset, args.tokenizer, model)
        for style, shots in STYLES:
            rows.append(measure(args, model, Path(work) / "out", style, shots))
            print("{style:7} {shots} shots  {seconds:6.1f} s  {processor_seconds:6.1f} CPU s  "
                  "{correct} / {questions}".format(**rows[-1]), flush=True)  # fmt: skip
    record = {
        "date": date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "threads": args.threads,
        "preset": args.preset,
        "parameters": parameters,
        "context": context,
        "load_average": os.getloadavg(),
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def prepare(preset: str, tokenizer: Path, model: Path) -> tuple[int, int]:
    """Write a model directory with random weights; return parameter count and context."""
    import torch

    from minimind.model import PRESETS, ModelConfig, Transformer, save_model
    from minimind.tokenizer import Tokenizer

    loaded = Tokenizer.load(tokenizer)
    torch.manual_seed(0)
    transformer = Transformer(ModelConfig(**PRESETS[preset] | {"vocab_size": loaded.vocab_size}))
    save_model(model, transformer, loaded)
    return sum(
        p.numel() for p in transformer.parameters()
    ), transformer.config.max_position_embeddings


def measure(
    args: argparse.Namespace, model: Path, out: Path, style: str, shots: int
) -> dict[str, object]:
    """Run one evaluation in a separate process."""
    command = [sys.executable, "-m", "minimind", "eval", str(model), "--task", "ceval"]
    command += ["--data", args.data, "--style", style, "--shots", str(shots)]
    command += ["--out", str(out), "--device", "cpu"]
    before, started = os.times(), time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    seconds, after = time.perf_counter() - started, os.times()
    used = after.children_user + after.children_system
    used -= before.children_user + before.children_system
    [metrics] = json.loads((out / "summary.json").read_text("utf-8"))["models"].values()
    [task] = metrics.values()
    return {
        "style": style,
        "shots": shots,
        "seconds": round(seconds, 1),
        "processor_seconds": round(used, 1),
        "correct": task["correct"],
        "questions": task["questions"],
        "fewest_shots": task["fewest_shots"],
        "cut": task["cut"],
    }


if __name__ == "__main__":
    main()
