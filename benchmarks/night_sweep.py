"""The sweeps behind the road `night`: mix of texts, then shape and tokens.

    nice -n 19 python -m benchmarks.night_sweep night-data --out out/night-sweep
    nice -n 19 python -m benchmarks.night_sweep night-data --out out/night-sweep --dry-run

NIGHT-DATA is what `benchmarks.night_data` wrote. Ctrl-C stops at a checkpoint, and the same command
continues. About an hour on two cores. The mix with the lowest loss is that of the other sweeps,
to which `benchmarks.scaling_law` is fitted.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind.signals import count_interrupts

_PROGRAM = [sys.executable, "-m", "minimind"]
_SEQ_LEN, _BATCH = 512, 32  # 16,384 tokens per step
VOCAB = 6_400
# Width, feed-forward width, layers, query heads, key/value heads, width of a head; tokens per
# second of training on two cores, estimated from those of the demo's shape and of `small`.
SHAPES = {
    "5M": ((256, 704, 4, 4, 2, 64), 16_000),
    "9M": ((320, 880, 6, 10, 5, 32), 8_000),
    "16M": ((384, 1056, 8, 12, 6, 32), 4_600),
}
_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
# Weight of each group of text by mix.
MIXES = {
    "even": dict.fromkeys(
        ("general", "life", "reading", "formal", "reviews", "classical", "english"), 1.0
    ),
    "weighted": {
        **{"general": 1.0, "life": 1.0, "reading": 2.0, "formal": 0.4},
        **{"reviews": 0.5, "classical": 0.3, "english": 0.5},
    },
    "modern": {"general": 1.0, "life": 1.0, "reading": 2.0, "formal": 0.4, "reviews": 0.5},
}
# The best mix adds 5M with 3M tokens.
LAW = {"5M": (1.5e6, 6e6, 12e6), "9M": (3e6, 6e6)}
# The best of benchmarks.quality_per_token.
RATES: Mapping[str, Sequence[str]] = {"optim.muon_lr": ["0.02"], "optim.lr": ["1.2e-2"]}
RECIPE = """\
extends = "pretrain-small"

[model]
max_position_embeddings = 512

[data]
seq_len = 512

[training]
global_batch_size = 32     # 16,384 tokens per step
log_every = 5

[validation]
every = 1000               # and once at the end
num_sequences = 512        # of the held-out sets; takes as long as 90,000 tokens of training
prompts = []

[checkpoint]
every = 50                 # a stop costs at most this many steps
keep = 1
keep_best = false
"""


@dataclass(frozen=True)
class Sweep:
    """A call of `minimind sweep`: settings by key, with the values that vary, and a mix."""

    name: str
    shape: str
    tokens: Sequence[float]
    settings: Mapping[str, Sequence[str]]
    mix: str

    @property
    def seconds(self) -> float:
        """Estimated time on two cores."""
        variants = 1
        for values in self.settings.values():
            variants *= len(values)
        return variants * sum(self.tokens) / SHAPES[self.shape][1]

    def arguments(self, data: Path, out: Path) -> list[str]:
        """Return the arguments of `minimind sweep`."""
        shape = SHAPES[self.shape][0]
        steps = ",".join(str(round(tokens / _SEQ_LEN / _BATCH)) for tokens in self.tokens)
        settings = [f"model.{key}={value}" for key, value in zip(_KEYS, shape, strict=True)]
        settings += [f"training.steps={steps}"]
        settings += [f"{key}={','.join(values)}" for key, values in self.settings.items()]
        sources = [f"{data / 'text' / group}@{w:g}" for group, w in MIXES[self.mix].items()]
        return [
            str(out / "recipe.toml"),
            *settings,
            f"data.store={out / 'stores'}",
            f"data.validation={json.dumps([str(data / 'text' / 'held-out')])}",
            *(part for source in sources for part in ("--data", source)),
            *("--tokenizer", str(out / "tokenizer"), "--out", str(out / self.name)),
        ]


@dataclass
class Program:
    """All sweeps in order; the results of each decide the settings of the next ones."""

    data: Path
    out: Path
    dry_run: bool

    def run(self) -> None:
        """Run the sweeps and fit the law. A sweep skips its finished runs."""
        losses = {}
        for mix in MIXES:
            name = f"mix-{mix}"
            self.sweep(Sweep(name, "5M", [3e6], RATES, mix))
            losses[mix] = min((loss for loss, _ in self.results(name)), default=0.0)
        mix = "weighted" if self.dry_run else min(losses, key=lambda name: losses[name])
        for shape, tokens in LAW.items():
            self.sweep(Sweep(f"law-{shape}", shape, tokens, RATES, mix))
        # The run of the best mix is one of the law's too.
        folders = [str(self.out / f"mix-{mix}"), *(str(self.out / f"law-{shape}") for shape in LAW)]
        command = [sys.executable, "-m", "benchmarks.scaling_law", *folders, "--hours", "8"]
        self.call([*command, "--out", str(self.out / "law")])

    def sweep(self, sweep: Sweep) -> None:
        """Run a sweep, or continue it."""
        print(f"{sweep.name}: about {sweep.seconds / 60:.0f} minutes on two cores", flush=True)
        self.call([*_PROGRAM, "sweep", *sweep.arguments(self.data, self.out)])

    def results(self, name: str) -> list[tuple[float, str]]:
        """Return (held-out bits per byte, run) of the finished runs of a sweep."""
        return [
            (summary["bits_per_byte"], path.parent.name)
            for path in sorted((self.out / name).glob("*/summary.json"))
            if "bits_per_byte" in (summary := _read(path))
        ]

    def call(self, command: Sequence[str]) -> None:
        """Run a command, or print it in a dry run. Exits with its status if it fails."""
        if self.dry_run:
            print(f"  {shlex.join(command)}")
            return
        # Only this process receives Ctrl-C; the command gets a SIGTERM for each request to stop.
        process = subprocess.Popen(command, start_new_session=True)
        with count_interrupts(lambda count: process.terminate()):
            status = process.wait()
        if status:
            sys.exit(status)


def _read(path: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return summary


def main() -> None:
    """Train the tokenizer, write the recipe, and run all sweeps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, metavar="NIGHT-DATA")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="print the commands and the times")
    args = parser.parse_args()
    program = Program(args.data, args.out, args.dry_run)
    tokenizer = args.out / "tokenizer"
    if not tokenizer.is_dir():
        texts = [str(args.data / "text" / group) for group in (*MIXES["modern"], "english")]
        texts += [str(args.data / f"{name}.jsonl") for name in ("single-turn", "multi-turn")]
        program.call(
            [*_PROGRAM, "tokenizer", "train", *texts, f"--vocab-size={VOCAB}", f"--out={tokenizer}"]
        )
    if not args.dry_run:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "recipe.toml").write_text(RECIPE, "utf-8")
    program.run()


if __name__ == "__main__":
    main()
