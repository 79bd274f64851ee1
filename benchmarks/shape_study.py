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
from statistics import fmean
from typing import Any

WIDTHS = {2: (128, 344), 4: (96, 216), 6: (80, 168), 8: (64, 176), 16: (48, 104)}
HEAD_DIM, VOCAB = 16, 2048
SEEDS = (0, 1)
RECIPE = """\
objective = "pretrain"

[data]
seq_len = 256
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
global_batch_size = 8
log_every = 10

[validation]
every = 25
num_sequences = 256

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
        size = ["--vocab-size", str(VOCAB), "--sample-mb", "3"]
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


def record(work: Path, out: Path) -> None:
    """OUT.json, OUT.md and OUT.svg, of the runs that are finished."""
    from minimind.reporting.runs import Run, find_runs

    found = find_runs([work / "runs"])
    runs: dict[int, list[Run]] = {layers: [] for layers in WIDTHS}
    for run in found.runs:
        if run.finished:
            runs[found.sweep_settings[run.name]["model.num_hidden_layers"]].append(run)
    shapes = []
    for layers, some in runs.items():
        hidden, inner = WIDTHS[layers]
        whole = some[0].summary["parameters"]
        shapes.append(
            {
                "layers": layers,
                "width": hidden,
                "feed_forward": inner,
                "parameters": whole,
                "parameters_without_embeddings": whole - VOCAB * hidden,
                "loss_by_seed": {run.settings["seed"]: run.summary["loss"] for run in some},
                "loss": fmean(run.summary["loss"] for run in some),
                "bits_per_byte": fmean(run.summary["bits_per_byte"] for run in some),
                "seconds": [round(run.summary["seconds"], 1) for run in some],
            }
        )
    first = next(run for some in runs.values() for run in some)
    metrics: dict[str, Any] = {
        "command": "python benchmarks/shape_study.py --work DIR train DATA…; … record",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores; two runs of one thread each",
        "data": [Path(source["path"]).name for source in first.settings["data"]["sources"]],
        "tokens": first.summary["tokens"],
        "unigram_bits_per_byte": first.summary["unigram_bits_per_byte"],
        "shapes": shapes,
        "recipe": RECIPE,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(
        json.dumps(metrics, ensure_ascii=False, indent=1) + "\n", "utf-8"
    )
    out.with_suffix(".md").write_text(_page(metrics), "utf-8")
    _plot(shapes, runs, out.with_suffix(".svg"))


def _page(metrics: dict[str, Any]) -> str:
    shapes = metrics["shapes"]
    best = min(shapes, key=lambda shape: shape["loss"])
    worst = max(shapes, key=lambda shape: shape["loss"])
    spreads = [
        max(losses) - min(losses)
        for shape in shapes
        if len(losses := list(shape["loss_by_seed"].values())) > 1
    ]
    noise = (
        f"Two seeds of a shape differ by {max(spreads):.3f} at the most "
        f"({len(spreads)} of the five have two)."
        if spreads
        else "There is one seed a shape, so nothing says how much of this is chance."
    )
    lines = [
        "# Deep and narrow against short and wide",
        "",
        f"`{metrics['command']}` · {metrics['date']} · {metrics['machine']}",
        "",
        "Five shapes of about 0.4 million parameters without embeddings, from 2 wide layers to 16 "
        f"narrow ones, each trained on the same {metrics['tokens']:,} tokens of Chinese text "
        "(encyclopaedia, web pages, news and essays: "
        f"{', '.join(metrics['data'])}; a tokenizer of {VOCAB:,} words trained on it) with the "
        "same recipe and seeds, by `minimind sweep`. Held-out loss in nats a token, mean over the "
        "seeds; lower is better. A model that knows only how often each token occurs has "
        f"{metrics['unigram_bits_per_byte']:.3f} bits per byte.",
        "",
        "| layers × width | parameters | without embeddings | loss | by seed | bits per byte |",
        "|---|---:|---:|---:|---|---:|",
    ]
    for shape in shapes:
        seeds = ", ".join(f"{loss:.3f}" for loss in shape["loss_by_seed"].values())
        lines.append(
            f"| {shape['layers']} × {shape['width']} | {shape['parameters']:,} | "
            f"{shape['parameters_without_embeddings']:,} | {shape['loss']:.3f} | {seeds} | "
            f"{shape['bits_per_byte']:.3f} |"
        )
    lines += [
        "",
        "![Held-out loss by tokens and by number of layers](shape-study.svg)",
        "",
        f"**What it shows.** After so little text, {best['layers']} × {best['width']} is the best "
        f"and {worst['layers']} × {worst['width']} the worst: {best['loss']:.3f} against "
        f"{worst['loss']:.3f}. {noise}",
        "",
        "**What it cannot show.** Whether deep and narrow wins at 26 million parameters, or at the "
        "125 million of MobileLLM (Liu et al. 2024), which finds that it does: those models see "
        "thousands of times as many tokens, and depth may pay late. Nor are the shapes "
        "alike in all but depth: with tied embeddings a wider model has more of them (the column "
        "of all parameters), and here they are a good part of it. The learning rates are the same "
        "for all, tuned for none; heads are 16 wide, so the narrow models have few. Training was "
        "timed beside other work on the machine, so that the seconds in `shape-study.json` do not "
        "compare the shapes' speed.",
        "",
        "With a GPU the same command, given wider shapes and more steps, can ask that.",
    ]
    return "\n".join(lines) + "\n"


def _plot(shapes: list[dict[str, Any]], runs: dict[int, list[Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "shape-study"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for shape in shapes:
        curves = [run.curves("loss", "tokens")["validation"] for run in runs[shape["layers"]]]
        tokens = [at for at, _ in curves[0]]
        means = [fmean(loss for _, loss in points) for points in zip(*curves, strict=True)]
        label = f"{shape['layers']} × {shape['width']}"
        axes[0].plot(tokens, means, marker="o", ms=3, label=label)
        seeds = list(shape["loss_by_seed"].values())
        axes[1].plot([shape["layers"]] * len(seeds), seeds, "o", color="C0")
    axes[1].plot(
        [shape["layers"] for shape in shapes], [shape["loss"] for shape in shapes], color="C0"
    )
    axes[0].set(xlabel="tokens", ylabel="held-out loss, nats a token")
    axes[1].set(xscale="log", xlabel="layers, about as many parameters in each")
    axes[1].set_xticks(list(WIDTHS), list(map(str, WIDTHS)))
    axes[1].minorticks_off()
    axes[0].legend(title="layers × width")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


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
    else:
        record(arguments.work, arguments.out)


if __name__ == "__main__":
    main()
