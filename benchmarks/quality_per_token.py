"""Held-out bits per byte at equal tokens: variants of the training recipe, and AdamW with cosine.

    python -m benchmarks.night_data DATA --out night-data
    python -m benchmarks.quality_per_token night-data --sweep out/night-sweep --out out/quality
    python -m benchmarks.quality_per_token night-data --sweep out/night-sweep --out out/quality \\
        --shape 16M --only adamw chosen

All runs have the same shape, tokens per step, order of documents (per seed) and held-out texts, and
a complete learning-rate schedule. `chosen` is the recipe that the others are compared with, with
three seeds; `adamw` is tuned over four learning rates, and its best one gets two more seeds. Ctrl-C
stops at a checkpoint, and the same command continues. SWEEP is the output of
`benchmarks.night_sweep`, whose tokenizer and token stores are used.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu.markdown import table
from benchmarks.night_sweep import RATES, RECIPE, SHAPES, Program, Sweep

_MIX = "weighted"
_SEEDS = ("0", "1", "2")
Settings = Mapping[str, Sequence[str]]
ADAMW: Settings = {
    "optim.name": ["adamw"],
    "schedule.name": ["cosine"],
    "schedule.final": ["0.1"],
}
ADAMW_RATES = ("5e-4", "1e-3", "2e-3", "4e-3")
# Name: what differs from `RATES`.
VARIANTS: Mapping[str, Settings] = {
    "embedding-lr": {"optim.lr": ["3e-3", "1e-3", "6e-3", "2.4e-2"]},
    "muon-lr": {"optim.muon_lr": ["0.01", "0.04"]},
    "qk-norm": {"model.qk_norm": ["true"]},
    "batch": {"training.global_batch_size": ["16"]},
    "weight-decay": {"optim.weight_decay": ["0.0"]},
    "momentum": {"optim.momentum": ["0.9"]},
    "cosine": {
        "schedule.name": ["cosine"],
        "schedule.final": ["0.0"],
    },
}


class Comparison(Program):
    """All runs of a shape, in order of importance."""

    def __init__(self, data: Path, out: Path, shape: str, tokens: float) -> None:
        super().__init__(data, out, dry_run=False)
        self.shape, self.tokens = shape, tokens

    def compare(self, names: Sequence[str]) -> None:
        """Run the experiments of these names."""
        if "chosen" in names:
            self.experiment("chosen", {**RATES, "seed": _SEEDS})
        if "adamw" in names:
            self.experiment("adamw", {**ADAMW, "optim.lr": ADAMW_RATES})
            rate = self.best_rate()
            self.experiment("adamw-seeds", {**ADAMW, "optim.lr": [rate], "seed": _SEEDS[1:]})
        for name in VARIANTS:
            if name in names:
                self.experiment(name, {**RATES, **VARIANTS[name]})

    def experiment(self, name: str, settings: Settings) -> None:
        """Run a sweep over the settings that have several values."""
        if "training.global_batch_size" in settings:  # equal tokens
            factor = 32 / int(settings["training.global_batch_size"][0])
            tokens = self.tokens * factor
        else:
            tokens = self.tokens
        self.sweep(Sweep(name, self.shape, [tokens], settings, _MIX))

    def best_rate(self) -> str:
        """Return the learning rate of AdamW with the lowest loss."""
        _, run = min(self.results("adamw"))
        settings = json.loads((self.out / "adamw" / "sweep.json").read_text("utf-8"))["settings"]
        return str(settings[run]["optim.lr"])

    def report(self) -> str:
        """Return a table of all finished experiments."""
        rows = []
        for folder in sorted(path.parent for path in self.out.glob("*/sweep.json")):
            for loss, run in self.results(folder.name):
                rows.append([folder.name, run, f"{loss:.4f}"])
        chosen = [loss for loss, _ in self.results("chosen")]
        if len(chosen) > 1:
            mean, spread = statistics.mean(chosen), statistics.stdev(chosen)
            rows.append(["chosen", "mean, standard deviation", f"{mean:.4f}, {spread:.4f}"])
        return "\n".join(table(["experiment", "run", "bits per byte"], rows))


def main() -> None:
    """Run the experiments and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, metavar="NIGHT-DATA")
    parser.add_argument(
        "--sweep", type=Path, required=True, help="output of benchmarks.night_sweep"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="5M")
    parser.add_argument("--tokens", type=float, default=3e6, help="per run; default: 3 million")
    names = ("chosen", "adamw", *VARIANTS)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--report", action="store_true", help="only print the table")
    args = parser.parse_args()
    out = args.out / args.shape
    comparison = Comparison(args.data, out, args.shape, args.tokens)
    if not args.report:
        out.mkdir(parents=True, exist_ok=True)
        (out / "recipe.toml").write_text(RECIPE, "utf-8")
        for name in ("tokenizer", "stores"):
            if not (out / name).exists():
                (out / name).symlink_to((args.sweep / name).resolve())
        comparison.compare(args.only)
    print(comparison.report())


if __name__ == "__main__":
    main()
