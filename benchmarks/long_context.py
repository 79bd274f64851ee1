"""Bits per byte beyond the trained context length, by RoPE scaling method.

    python benchmarks/long_context.py --work DIR train      # minutes on 2 CPU cores
    python benchmarks/long_context.py --work DIR measure --out benchmarks/records/long-context

`train` collects the source files of the Python standard library (long documents with long-range
dependencies that every installation has), and trains a tokenizer and a model of 1M parameters on
sequences of 512 tokens. `measure` reads held-out files of at least 4,096 tokens at contexts of
512, 1,024, 2,048 and 4,096 tokens, and writes the bits per byte of each scaling method, by context
length and by position within the longest context.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import sysconfig
from datetime import date
from pathlib import Path
from typing import Any

import torch

TRAINED_AT = 512
LENGTHS = [512, 1024, 2048, 4096]
KINDS = ["none", "linear", "dynamic", "yarn"]
DOCUMENTS = 24  # read by `measure`, the first 4,096 tokens of each
_BY_CONTEXT = "bits_per_byte_by_context"
_CHUNK = 1024  # tokens per chunk of logits
HELD_OUT = 12  # one in 12 files is held-out, chosen by the hash of its text


def documents() -> tuple[list[str], list[str]]:
    """Return the training and the held-out source files of the standard library."""
    sides: tuple[list[str], list[str]] = ([], [])
    hashes = set()
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        inside = path.relative_to(sysconfig.get_path("stdlib")).parts
        if inside[0] in ("site-packages", "lib2to3", "encodings") or "idlelib" in inside:
            continue  # third-party code, or tables
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # a test of another encoding
        key = hashlib.sha256(text.encode()).digest()
        if len(text) > 500 and key not in hashes:
            hashes.add(key)
            sides[key[0] % HELD_OUT == 0].append(text)
    return sides


def train(work: Path) -> None:
    """Write data, tokenizer and model to `work`."""
    from minimind.cli.console import RichReporter
    from minimind.config import Recipe
    from minimind.tokenizer import train_tokenizer
    from minimind.training.stage import run_stage

    work.mkdir(parents=True, exist_ok=True)
    training, held_out = documents()
    for name, texts in (("training", training), ("held-out", held_out)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (work / f"{name}.jsonl").write_text(lines, "utf-8")
    train_tokenizer(training, vocab_size=2048).save(work / "tokenizer")
    recipe = Recipe.model_validate(
        {
            "objective": "pretrain",
            "out": str(work / "run"),
            "tokenizer": str(work / "tokenizer"),
            "device": "cpu",
            "model": {
                "preset": "demo",
                "hidden_size": 128,
                "intermediate_size": 352,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
            },
            "data": {
                "sources": [str(work / "training.jsonl")],
                "validation": [str(work / "held-out.jsonl")],
                "seq_len": TRAINED_AT,
                "store": str(work / "stores"),
            },
            "optim": {"muon_lr": 0.02, "lr": 3e-3, "weight_decay": 0.0},
            "schedule": {"name": "wsd", "warmup": 0.03, "decay": 0.4, "final": 0.0},
            "training": {"steps": 300, "global_batch_size": 8},
            "validation": {"every": 150},
            "checkpoint": {"every": 100, "keep": 1},
        }
    )
    run_stage(recipe, reporter=RichReporter())


def measure(work: Path, out: Path) -> None:
    """Write OUT.json, OUT.svg and OUT.md."""
    from minimind.inference.load import load_for_inference

    model, tokenizer = load_for_inference(work / "run", "cpu", dtype=torch.float32)
    config = model.config
    texts = [json.loads(line)["text"] for line in (work / "held-out.jsonl").open("rb")]
    longest = LENGTHS[-1]
    encoded = [ids for ids in map(tokenizer.encode, texts) if len(ids) > longest][:DOCUMENTS]
    tokens = torch.tensor([ids[: longest + 1] for ids in encoded])
    num_bytes = torch.tensor(tokenizer.token_bytes)[tokens[:, 1:]]

    def bits(kind: str, context: int, length: int) -> torch.Tensor:
        """Return the bits of each token in contexts of `length`: [documents, longest]."""
        model.config, model._rope = config, None
        if kind == "none":
            model.config = config.model_copy(update={"max_position_embeddings": context})
        else:
            model.extend_context(context, kind)  # type: ignore[arg-type]
        return torch.cat([_nats(model, row, length) for row in tokens]) / math.log(2)

    def per_byte(bits_of: torch.Tensor, where: slice = slice(None)) -> float:
        return float(bits_of[:, where].sum() / num_bytes[:, where].sum())

    by_length: dict[str, dict[int, float]] = {kind: {} for kind in KINDS}
    extended: dict[str, dict[int, float]] = {kind: {} for kind in KINDS[1:]}
    by_position: dict[str, dict[str, float]] = {}
    ranges = list(zip([0, *LENGTHS], LENGTHS, strict=False))
    for kind in KINDS:
        for length in LENGTHS:
            token_bits = bits(kind, length, length)
            by_length[kind][length] = per_byte(token_bits)
            if length == longest:
                by_position[kind] = {
                    f"{start}-{end}": per_byte(token_bits, slice(start, end))
                    for start, end in ranges
                }
            print(kind, length, by_length[kind][length], flush=True)
        if kind != "none":
            for length in LENGTHS:
                extended[kind][length] = per_byte(bits(kind, longest, length))
    record = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "command": "python benchmarks/long_context.py --work DIR train; … measure",
        "model": config.model_dump(exclude_none=True),
        "training": json.loads((work / "run" / "summary.json").read_text("utf-8")),
        "recipe": (work / "run" / "recipe.toml").read_text("utf-8").replace(str(work), "DIR"),
        "documents": len(encoded),
        "tokens": int(num_bytes.numel()),
        "bytes": int(num_bytes.sum()),
        _BY_CONTEXT: by_length,
        "bits_per_byte_by_position_at_4096": by_position,
        "bits_per_byte_extended_to_4096_by_context": extended,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    out.with_suffix(".md").write_text(_page(record), "utf-8")
    _plot(by_length, by_position, out.with_suffix(".svg"))


@torch.inference_mode()
def _nats(model: Any, row: torch.Tensor, length: int) -> torch.Tensor:
    """Return the nats of each token of `row` after the first: [1, len(row) - 1]."""
    parts = []
    for start in range(0, len(row) - 1, length):
        hidden = model(row[None, start : start + length])[0]
        labels = row[start + 1 : start + length + 1]
        for offset in range(0, length, _CHUNK):
            chunk = slice(offset, offset + _CHUNK)
            logits = model.logits(hidden[chunk]).float()
            parts.append(torch.nn.functional.cross_entropy(logits, labels[chunk], reduction="none"))
    return torch.cat(parts)[None]


def _page(record: dict[str, Any]) -> str:
    trained = record["training"]
    lines = [
        "# Longer contexts: bits per byte by RoPE scaling",
        "",
        f"`{record['command']}` · {record['date']} · {record['machine']}",
        "",
        f"A model of {trained['parameters']:,} parameters, trained on sequences of "
        f"{TRAINED_AT} on {trained['tokens']:,} tokens of the Python standard library's source "
        f"({trained['seconds']:.0f} s; other work ran on the machine), reads the first "
        f"{LENGTHS[-1]:,} tokens of {record['documents']} held-out source files of at least that "
        f"length ({record['bytes']:,} bytes), split into contexts. Every value is over the same "
        "tokens; lower is better. Recipe and all values: `long-context.json`; plot: "
        "`long-context.svg`.",
    ]
    at_longest = {kind: row[LENGTHS[-1]] for kind, row in record[_BY_CONTEXT].items()}
    best = min(at_longest, key=lambda kind: at_longest[kind])
    short = record[_BY_CONTEXT]["none"][LENGTHS[0]]
    lines += [
        "",
        f"At {LENGTHS[-1]:,} tokens {best} is the best method: {at_longest[best]:.3f}, without "
        f"scaling {at_longest['none']:.3f}. In contexts of {LENGTHS[0]} it is {short:.3f}: "
        + (
            "the longer context helps this model."
            if at_longest[best] < short
            else "scaling keeps longer texts readable, but this small, briefly trained model does "
            "not benefit from them."
        ),
    ]
    for title, key, first in (
        ("Extended to the context length", _BY_CONTEXT, "context"),
        (
            "By position in contexts of 4,096",
            "bits_per_byte_by_position_at_4096",
            "tokens",
        ),
        (
            "Extended to 4,096 at every context length: the cost of too large an extension",
            "bits_per_byte_extended_to_4096_by_context",
            "context",
        ),
    ):
        table: dict[str, dict[Any, float]] = record[key]
        lines += ["", f"## {title}", "", f"| {first} | " + " | ".join(table) + " |"]
        lines.append("|---|" + "---|" * len(table))
        for row in next(iter(table.values())):
            cells = " | ".join(f"{table[kind][row]:.3f}" for kind in table)
            lines.append(f"| {row} | {cells} |")
    return "\n".join(lines) + "\n"


def _plot(
    by_length: dict[str, dict[int, float]], by_position: dict[str, dict[str, float]], path: Path
) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "long-context"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for kind in KINDS:
        axes[0].plot(LENGTHS, list(by_length[kind].values()), marker="o", label=kind)
        axes[1].plot(list(by_position[kind]), list(by_position[kind].values()), marker="o")
    axes[0].set(xscale="log", xlabel="context, tokens", ylabel="bits per byte")
    axes[0].set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
    axes[0].minorticks_off()
    axes[1].set(xlabel="position in contexts of 4,096")
    axes[0].legend(title=f"scaling (trained at {TRAINED_AT})")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Train or measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("what", choices=["train", "measure"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/records/long-context"))
    arguments = parser.parse_args()
    if arguments.what == "train":
        train(arguments.work)
    else:
        measure(arguments.work, arguments.out)


if __name__ == "__main__":
    main()
