"""Deep and narrow against short and wide: five shapes of about as many parameters, by `sweep`.

    python benchmarks/shape_study.py --work DIR train DATA…     # about half an hour on 2 CPU cores
    python benchmarks/shape_study.py --work DIR record --out benchmarks/records/shape-study

`train` makes a tokenizer of DATA and runs `minimind sweep`; stopped, it goes on when started
again. `record` writes OUT.json, OUT.md and OUT.svg from the runs that are finished.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

WIDTHS = {2: (128, 344), 4: (96, 216), 6: (80, 168), 8: (64, 176), 16: (48, 104)}
HEAD_DIM = 16
SEEDS = (0, 1)
RECIPE = """\
objective = "pretrain"

[data]
window = 256
validation_fraction = 0.03

[optim]
name = "muon"
muon_lr = 0.02
lr = 3e-3
weight_decay = 0.0

[schedule]
name = "wsd"
warmup = 0.03
decay = 0.4
final = 0.0

[training]
steps = 250
batch = 8
log_every = 10

[validation]
every = 25
windows = 256

[checkpoint]
every = 50
keep = 1
"""


def shapes() -> str:
    """The values of `model` for the sweep, a table a shape."""
    tables = []
    for layers, (hidden, inner) in WIDTHS.items():
        heads = hidden // HEAD_DIM
        tables.append(
            f"{{num_hidden_layers={layers}, hidden_size={hidden}, intermediate_size={inner}, "
            f"num_attention_heads={heads}, num_key_value_heads={heads}, head_dim={HEAD_DIM}}}"
        )
    return ",".join(tables)


def train(work: Path, data: list[str]) -> None:
    """Tokenizer, recipe and runs, each kept in `work`."""
    minimind = [sys.executable, "-m", "minimind"]
    work.mkdir(parents=True, exist_ok=True)
    tokenizer, recipe = work / "tokenizer", work / "recipe.toml"
    if not tokenizer.is_dir():
        size = ["--vocab-size", "2048", "--sample-mb", "3"]
        subprocess.run(
            [*minimind, "tokenizer", "train", *data, *size, "--out", str(tokenizer)], check=True
        )
    recipe.write_text(RECIPE, "utf-8")
    seeds = ",".join(map(str, SEEDS))
    sources = [part for path in data for part in ("--data", path)]
    command = [*minimind, "sweep", str(recipe), f"seed={seeds}", f"model={shapes()}"]
    command += [*sources, "--tokenizer", str(tokenizer), "--out", str(work / "runs")]
    command += [f"data.store={work / 'stores'}", "--devices", "cpu,cpu"]
    # Two runs of one thread each: matrices this small gain little from a second one.
    sys.exit(subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    verbs = parser.add_subparsers(dest="what", required=True)
    verbs.add_parser("train").add_argument("data", nargs="+")
    out = Path("benchmarks/records/shape-study")
    verbs.add_parser("record").add_argument("--out", type=Path, default=out)
    arguments = parser.parse_args()
    if arguments.what == "train":
        train(arguments.work, arguments.data)


if __name__ == "__main__":
    main()
