"""Speed, memory and utilisation against model size, sequence length, batch and input size.

    python -m benchmarks.scaling --out benchmarks/records/scaling       # about 6 minutes on 2 cores
    python -m benchmarks.scaling --out benchmarks/records/scaling --render  # from the record again

Training: tokens per second of training steps on random tokens, each model in a separate process,
with a global batch of 65,536 tokens. Models have 1 to 109 million parameters, sequences 128 to
4,096 tokens, micro-batches 1 to 32 sequences. Utilisation is the FLOPs of the model per second
divided by those of the fastest matrix product, measured just before and after in the same process,
so that it does not depend on what the machine does meanwhile. The cost per token grows no faster
than the FLOPs if the utilisation of no point is lower than that of the first.

Whole commands: `data prepare`, `eval --task bpb` and `generate` (one token, which is the start-up
time) against the size of their input. Their time grows no faster than the input if the time that
more input adds, per unit of it, does not grow.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu.markdown import table
from benchmarks.rounds import (
    Contender,
    add_options,
    answer_requests,
    measure_in_turns,
    recording,
    this_script,
)

_TOLERANCE = 1.05
_BATCH_TOKENS, _PASS_TOKENS = 65_536, 4_096
_AXES = {"parameters": "parameters", "seq_len": "sequence length", "micro_batch": "micro-batch"}
_COMMANDS = {
    "prepare": "data prepare, MB of text",
    "eval": "eval --task bpb, MB of text",
    "generate": "start-up, million parameters",
}
# Width, feed-forward width, layers, query heads, key/value heads of 32 units.
_SHAPES = {
    "1M": (96, 256, 3, 3, 3),
    "10M": (384, 1056, 5, 12, 6),
    "59M": (640, 1728, 12, 20, 10),
}
_SETTINGS = (
    "model.hidden_size",
    "model.intermediate_size",
    "model.num_hidden_layers",
    "model.num_attention_heads",
    "model.num_key_value_heads",
)


@dataclass(frozen=True)
class Point:
    """A measured training step: a preset or a shape above, and the sizes of a micro-batch."""

    axis: str
    model: str
    seq_len: int
    micro_batch: int

    @property
    def name(self) -> str:
        return f"{self.axis}: {self.model}, {self.micro_batch} x {self.seq_len}"


def points(quick: bool) -> list[Point]:
    """Return the points of every axis, smallest first."""
    models = ["1M", "demo", "10M", "small", "59M", "base"]
    lengths, batches, model, pass_tokens = [128, 256, 512, 1024, 2048, 4096], 32, "small", 4096
    if quick:
        models, lengths, batches, model, pass_tokens = ["nano", "1M"], [32, 64], 2, "nano", 128
    length = lengths[min(2, len(lengths) - 1)]
    sizes = [batch for batch in (1, 2, 4, 8, 16, 32) if batch <= batches]
    return [
        *(Point("parameters", name, length, pass_tokens // length) for name in models),
        *(Point("seq_len", model, n, pass_tokens // n) for n in lengths),
        *(Point("micro_batch", model, lengths[1], size) for size in sizes),
    ]


def main() -> None:
    """Measure everything, print the tables, write the record, its page and its plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser, rounds=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="per point")
    parser.add_argument("--out", type=Path, help="write OUT.json, OUT.md and OUT.svg")
    parser.add_argument("--render", action="store_true", help="measure nothing; use OUT.json")
    args = parser.parse_args()
    known = {point.name: point for point in points(args.quick)}
    if args.contender in known:
        answer_requests(partial(train, known[args.contender], args.seconds))
        return
    if args.contender:
        name, _, size = args.contender.partition(" ")
        answer_requests(partial(run_command, args, name, float(size)))
        return
    if args.out:
        args.json = args.out.with_suffix(".json")
    if not args.render:
        with tempfile.TemporaryDirectory() as work, recording(args) as record:
            args.work = Path(work)
            record |= measure(args, list(known.values()))
            record["markdown"] = page(record)
    if args.out:
        record = json.loads(args.json.read_text("utf-8"))
        args.out.with_suffix(".md").write_text("\n".join(page(record)) + "\n", "utf-8")
        args.out.with_suffix(".svg").write_text(plot(record), "utf-8")


def measure(args: argparse.Namespace, training: list[Point]) -> dict[str, Any]:
    """Measure every point and command, one process at a time."""

    def one(name: str) -> dict[str, float]:
        contender: Contender = this_script(args, name)
        measured = measure_in_turns([contender], args.rounds, args.threads, args.work)[name]
        return {key: median(metrics[key] for metrics in measured) for key in measured[0]}

    sizes = prepare(args)
    return {
        "quick": args.quick,
        "training": [asdict(point) | one(point.name) for point in training],
        "commands": {
            name: [{"size": size} | one(f"{name} {size}") for size in sizes[name]]
            for name in _COMMANDS
        },
    }


def train(point: Point, seconds: float) -> dict[str, float]:
    """Measure the training steps of one point."""
    import torch

    from minimind.config import load_recipe
    from minimind.model import Transformer
    from minimind.planning.attainable import attainable_flops
    from minimind.planning.bench import measure_utilisation

    flags: dict[str, Any] = {
        "device": "cpu",
        "data.seq_len": point.seq_len,
        "training.global_batch_size": max(point.micro_batch, _BATCH_TOKENS // point.seq_len),
        "model.max_position_embeddings": point.seq_len,
    }
    if shape := _SHAPES.get(point.model):
        flags |= dict(zip(_SETTINGS, shape, strict=True)) | {"model.head_dim": 32}
    else:
        flags["model.preset"] = point.model
    recipe, device = load_recipe("pretrain-small", flags=flags).recipe, torch.device("cpu")
    model = Transformer(recipe.model.shape(6400))
    dtype = torch.bfloat16
    before = attainable_flops(device, dtype, seconds / 10)
    return measure_utilisation(recipe, model, device, point.micro_batch, dtype, seconds, before)


def prepare(args: argparse.Namespace) -> dict[str, list[float]]:
    """Write texts and models for the commands; return the input sizes of each."""
    import random

    import torch

    from minimind.data.textbook import prose
    from minimind.model import PRESETS, ModelConfig, Transformer, save_model
    from minimind.tokenizer import train_tokenizer

    sizes = {"prepare": [1.0, 3.0, 9.0], "eval": [0.05, 0.15, 0.45]}
    models = ["demo", "small", "base"]
    if args.quick:
        sizes, models = {"prepare": [0.02, 0.06], "eval": [0.01, 0.03]}, ["nano", "demo"]
    sentences = prose(1)
    tokenizer = train_tokenizer([next(sentences) for _ in range(2_000)], vocab_size=600)
    torch.manual_seed(0)
    parameters = []
    for name in models:
        model = Transformer(ModelConfig(**PRESETS[name] | {"vocab_size": tokenizer.vocab_size}))
        parameters.append(round(sum(p.numel() for p in model.parameters()) / 1e6, 2))
        save_model(args.work / f"model-{parameters[-1]}", model, tokenizer)
    (args.work / "model").symlink_to(f"model-{parameters[0]}")
    rng = random.Random(0)
    for name in ("prepare", "eval"):
        for size in sizes[name]:
            written = 0
            with (args.work / f"{name}-{size}.jsonl").open("w", encoding="utf-8") as stream:
                while written < size * 1e6:
                    text = "\n".join(next(sentences) for _ in range(rng.randint(4, 16)))
                    written += len(text.encode())
                    stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return sizes | {"generate": parameters}


def run_command(args: argparse.Namespace, name: str, size: float) -> dict[str, float]:
    """Run one command of minimind; return its seconds."""
    work, out = args.work, str(args.work / f"out-{time.time_ns()}")
    text = str(work / f"{name}-{size}.jsonl")
    words = {
        "prepare": ["data", "prepare", text, "--out", out, "--workers", "1"],
        "eval": ["eval", str(work / "model"), "--task", "bpb", "--data", text, "--device", "cpu"],
        "generate": ["generate", str(work / f"model-{size}"), "长江", "--max-new-tokens", "1"],
    }[name]
    if name == "eval":
        words += ["--out", out]
    started = time.perf_counter()
    command = [sys.executable, "-P", "-m", "minimind", *words]
    subprocess.run(command, check=True, stdout=2, env=os.environ)
    return {"seconds": time.perf_counter() - started}


def page(record: dict[str, Any]) -> list[str]:
    """Return the record as Markdown: verdicts and a table per axis."""
    lines = ["# Growth of speed, memory and cost", ""]
    lines += [
        f"`{record['command']}`, {record['date']}, {record['machine']}, "
        f"OMP_NUM_THREADS={record['threads']}."
    ]
    if record["quick"]:
        lines += [
            "",
            "**A trial with the smallest sizes: it shows the form of the record, and its "
            "figures mean nothing.**",
        ]
    lines += ["", "![Speed, memory and utilisation](scaling.svg)", ""]
    head = ["model", "micro-batch", "parameters", "FLOPs per token", "tokens/s", "peak MB"]
    for axis, title in _AXES.items():
        rows = [point for point in record["training"] if point["axis"] == axis]
        lines += [f"## By {title}", "", verdict(rows), ""]
        lines += table(
            [*head, "utilisation", "cost / FLOPs"],
            [
                [
                    point["model"],
                    f"{point['micro_batch']} x {point['seq_len']}",
                    f"{point['parameters'] / 1e6:,.1f}M",
                    f"{point['flops_per_token'] / 1e6:,.0f}M",
                    f"{point['tokens_per_second']:,.0f}",
                    f"{point['peak_mb']:,.0f}",
                    f"{point['utilisation']:.1%}",
                    f"{rows[0]['utilisation'] / point['utilisation']:.2f}",
                ]
                for point in rows
            ],
        )
        lines += [""]
    lines += ["## Commands", ""]
    for name, title in _COMMANDS.items():
        rows = record["commands"][name]
        lines += [command_verdict(title, rows), ""]
        lines += table(
            [title.partition(", ")[2], "seconds"],
            [[f"{row['size']:,.3g}", f"{row['seconds']:.1f}"] for row in rows],
        )
        lines += [""]
    return lines[:-1]


def verdict(rows: list[dict[str, Any]]) -> str:
    """State whether the cost per token grows no faster than the FLOPs per token."""
    worst = max(rows, key=lambda point: rows[0]["utilisation"] / point["utilisation"])
    growth = rows[0]["utilisation"] / worst["utilisation"]
    if growth <= _TOLERANCE:
        return "The cost per token grows no faster than the FLOPs per token."
    return (
        f"The cost per token grows faster than the FLOPs per token: {growth:.2f} times as fast "
        f"at {worst['model']}, {worst['micro_batch']} x {worst['seq_len']}."
    )


def command_verdict(title: str, rows: list[dict[str, float]]) -> str:
    """State whether the time that more input adds, per unit of it, stays the same."""
    slopes = [
        (after["seconds"] - before["seconds"]) / (after["size"] - before["size"])
        for before, after in pairwise(rows)
    ]
    command = title.partition(",")[0]
    if len(slopes) < 2 or slopes[-1] <= max(slopes[0], 0) * _TOLERANCE:
        return f"The time of {command} grows no faster than its input."
    return f"The time of {command} grows faster than its input: {slopes[-1] / slopes[0]:.2f} times."


def plot(record: dict[str, Any]) -> str:
    """Return the plot as an SVG file: a column per axis, and a row of commands."""
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    from minimind.reporting.plots import as_file, new_figure, to_svg

    metrics = {
        "tokens_per_second": ("tokens/s", EngFormatter(sep="")),
        "peak_mb": ("peak memory, MB", EngFormatter(sep="")),
        "utilisation": ("utilisation", PercentFormatter(1, decimals=0)),
    }
    with new_figure((10, 10.5), salt="scaling") as figure:
        charts = figure.subplots(4, 3)
        for column, (axis, title) in enumerate(_AXES.items()):
            rows = [point for point in record["training"] if point["axis"] == axis]
            sizes = [point[axis] for point in rows]
            for chart, (metric, (label, formatter)) in zip(
                charts[:3, column], metrics.items(), strict=True
            ):
                chart.plot(sizes, [point[metric] for point in rows], marker="o", ms=3.5)
                chart.set(xscale="log", xlabel=title, ylim=(0, None))
                chart.set_ylabel("" if column else label)
                chart.set_xticks(sizes, [_short(size) for size in sizes], fontsize=8)
                chart.minorticks_off()
                chart.yaxis.set_major_formatter(formatter)
        for chart, (name, title) in zip(charts[3], _COMMANDS.items(), strict=True):
            rows = record["commands"][name]
            chart.plot([r["size"] for r in rows], [r["seconds"] for r in rows], marker="o", ms=3.5)
            chart.set(xlabel=title, xlim=(0, None), ylim=(0, None))
        charts[3][0].set_ylabel("seconds")
        for chart in charts.flat:
            low, high = chart.get_ylim()
            chart.set_ylim(low, 1.08 * high)
            chart.yaxis.set_major_locator(MaxNLocator(5))
            chart.grid(alpha=0.15)
        return as_file(to_svg(figure))


def _short(number: float) -> str:
    """Format 26,900,000 as 27M and 4,096 as 4096."""
    return f"{number:.0f}" if number < 1e5 else f"{float(f'{number / 1e6:.2g}'):g}M"


if __name__ == "__main__":
    main()
