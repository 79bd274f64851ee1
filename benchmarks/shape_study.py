"""Depth against width: five shapes with similar parameter counts, trained by `minimind sweep`.

    python benchmarks/shape_study.py --work DIR train DATA…     # about half an hour on 2 CPU cores
    python benchmarks/shape_study.py --work DIR record --out benchmarks/records/shape-study

`train` trains a tokenizer on DATA and runs `minimind sweep`; the same command resumes it. `record`
writes OUT.json, OUT.md and OUT.svg from the finished runs.
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
    """Return the values of `model` for the sweep, one TOML table per shape."""
    tables = []
    for layers, (hidden, inner) in WIDTHS.items():
        heads = hidden // HEAD_DIM
        tables.append(
            f"{{num_hidden_layers={layers}, hidden_size={hidden}, intermediate_size={inner}, "
            f"num_attention_heads={heads}, num_key_value_heads={heads}, head_dim={HEAD_DIM}}}"
        )
    return ",".join(tables)


def train(work: Path, data: list[str]) -> None:
    """Write tokenizer, recipe and runs to `work`."""
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
    # Two runs with one thread each: matrices this small gain little from a second thread.
    sys.exit(subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode)


def record(work: Path, out: Path) -> None:
    """Write OUT.json, OUT.md and OUT.svg from the finished runs."""
    from minimind.reporting.runs import Run, find_runs

    runs: dict[int, list[Run]] = {layers: [] for layers in WIDTHS}
    for run in find_runs([work / "runs"]).runs:
        if run.finished:
            runs[run.varied["model.num_hidden_layers"]].append(run)
    shapes = []
    for layers, runs_of_shape in runs.items():
        hidden, inner = WIDTHS[layers]
        parameters = runs_of_shape[0].summary["parameters"]
        shapes.append(
            {
                "layers": layers,
                "width": hidden,
                "feed_forward": inner,
                "parameters": parameters,
                "parameters_without_embeddings": parameters - VOCAB * hidden,
                "loss_by_seed": {
                    run.settings["seed"]: run.summary["loss"] for run in runs_of_shape
                },
                "loss": fmean(run.summary["loss"] for run in runs_of_shape),
                "bits_per_byte": fmean(run.summary["bits_per_byte"] for run in runs_of_shape),
                "seconds": [round(run.summary["seconds"], 1) for run in runs_of_shape],
            }
        )
    first = next(run for runs_of_shape in runs.values() for run in runs_of_shape)
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
        f"Two seeds of a shape differ by at most {max(spreads):.3f} "
        f"({len(spreads)} of the five have two)."
        if spreads
        else "With one seed per shape, the noise is unknown."
    )
    lines = [
        "# Depth against width",
        "",
        f"`{metrics['command']}` · {metrics['date']} · {metrics['machine']}",
        "",
        "Five shapes of about 0.4 million parameters without embeddings, from 2 wide layers to 16 "
        f"narrow ones, each trained on the same {metrics['tokens']:,} tokens of Chinese text "
        "(encyclopaedia, web pages, news and essays: "
        f"{', '.join(metrics['data'])}; a tokenizer of {VOCAB:,} tokens trained on it) with the "
        "same recipe and seeds, by `minimind sweep`. Held-out loss in nats per token, mean over "
        "seeds; lower is better. A unigram model has "
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
        "thousands of times as many tokens, and depth may pay late. Nor do the "
        "shapes differ in depth alone: a wider model has more embedding parameters (see the column "
        "of all parameters), a large share at this size. All shapes use the same untuned learning "
        "rates; heads are 16 wide, so narrow models have few. Other work ran on the machine, so "
        "the seconds in `shape-study.json` do not compare the speed of the shapes.",
        "",
        "The same command on a GPU, with wider shapes and more steps, can answer these questions.",
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
        tokens = [position for position, _ in curves[0]]
        means = [fmean(loss for _, loss in points) for points in zip(*curves, strict=True)]
        label = f"{shape['layers']} × {shape['width']}"
        axes[0].plot(tokens, means, marker="o", ms=3, label=label)
        seeds = list(shape["loss_by_seed"].values())
        axes[1].plot([shape["layers"]] * len(seeds), seeds, "o", color="C0")
    axes[1].plot(
        [shape["layers"] for shape in shapes], [shape["loss"] for shape in shapes], color="C0"
    )
    axes[0].set(xlabel="tokens", ylabel="held-out loss, nats per token")
    axes[1].set(xscale="log", xlabel="layers, at similar parameter counts")
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
