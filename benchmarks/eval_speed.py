"""Time of `minimind eval` for the 1,346 questions of C-Eval, in each prompt style.

    python -m benchmarks.eval_speed --data DIR --tokenizer DIR [--checkout DIR] [--json FILE]

The weights are random, because the time does not depend on them. `--data` holds C-Eval, and
`--tokenizer` a tokenizer of the preset's size, which determines the number of tokens. The time is
that of the complete command, including loading and writing; with --checkout, the command of another
checkout runs too. Questions per CPU second, summed over all cores, are recorded too, because other
work on the machine affects them less.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.rounds import (
    add_options,
    answer_requests,
    comparison,
    measure_in_turns,
    over_rounds,
    recording,
    this_script,
)

STYLES = {"chat": 0, "letter": 0, "letter, 5 shots": 5, "answer": 0}
_COLUMNS = {
    "questions_per_second": ("questions/s", 1),
    "questions_per_cpu_second": ("questions per CPU second", 1),
    "seconds": ("seconds", 1),
    "correct": ("correct", 0),
}


def main() -> None:
    """Measure each prompt style, print a table per style, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser, rounds=1)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--checkout", type=Path, help="folder of another checkout of minimind")
    args = parser.parse_args()
    if args.contender:
        answer_requests(partial(evaluate, args))
        return
    styles = ["chat"] if args.quick else list(STYLES)
    sides = ["minimind", *(["checkout"] if args.checkout else [])]
    with tempfile.TemporaryDirectory() as work, recording(args) as record:
        args.work = Path(work)
        record |= prepare(args) | {"over_rounds": {}, "rounds": {}, "markdown": []}
        for style in styles:
            contenders = [this_script(args, f"{side}: {style}") for side in sides]
            rounds = measure_in_turns(contenders, args.rounds, args.threads, args.work)
            record["rounds"] |= rounds
            record["over_rounds"] |= over_rounds(rounds)
            record["markdown"] += comparison(
                rounds, _COLUMNS, metric="questions_per_second", reference=contenders[0].name
            )


def prepare(args: argparse.Namespace) -> dict[str, int]:
    """Write a model directory with random weights; return its parameter count and context."""
    import torch

    from minimind.model import PRESETS, ModelConfig, Transformer, save_model
    from minimind.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(args.tokenizer)
    preset = "nano" if args.quick else args.preset
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**PRESETS[preset] | {"vocab_size": tokenizer.vocab_size}))
    save_model(args.work / "model", model, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "context": model.config.max_position_embeddings}


def evaluate(args: argparse.Namespace) -> dict[str, float]:
    """Run one evaluation in a separate process."""
    side, _, style = args.contender.partition(": ")
    out = args.work / f"out-{time.time_ns()}"
    command = [sys.executable, "-P", "-m", "minimind", "eval", str(args.work / "model")]
    command += ["--task", "ceval", "--data", args.data, "--style", style.partition(",")[0]]
    command += ["--shots", str(STYLES[style]), "--out", str(out), "--device", "cpu"]
    paths = [str(args.checkout.resolve())] if side == "checkout" else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ["PYTHONPATH"]])}
    before, started = os.times(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    seconds, after = time.perf_counter() - started, os.times()
    cpu_s = after.children_user + after.children_system
    cpu_s -= before.children_user + before.children_system
    [metrics] = json.loads((out / "summary.json").read_text("utf-8"))["models"].values()
    [task] = metrics.values()
    return {
        "questions_per_second": task["questions"] / seconds,
        "questions_per_cpu_second": task["questions"] / cpu_s,
        "seconds": seconds,
        "correct": task["correct"],
        "questions": task["questions"],
    }


if __name__ == "__main__":
    main()
