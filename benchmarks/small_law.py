"""A scaling law of small models: short runs, a longer run that the law predicts, repeated data.

    python -m benchmarks.small_law --work DIR train DATA…    # under an hour on 2 busy CPU cores
    python -m benchmarks.small_law --work DIR record --out benchmarks/records/small-law

`train` trains a tokenizer on DATA and runs `minimind sweep` several times; the same command
continues it. `record` fits the law of `benchmarks.scaling_law` to the short runs, compares the
other runs with its predictions, and writes OUT.json, OUT.md and OUT.svg.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import scaling_law
from benchmarks.gpu.markdown import table

VOCAB, HEAD_DIM, SEQ_LEN, BATCH = 2048, 16, 256, 8
SHAPES = {
    "0.1M": (32, 88, 2),
    "0.2M": (64, 176, 2),
    "0.5M": (96, 264, 3),
    "1M": (144, 384, 3),
    "2M": (192, 512, 4),
}
TOKENS = {
    "0.1M": (1e6, 4e6),
    "0.2M": (0.25e6, 0.5e6, 1e6, 2e6, 4e6),
    "0.5M": (0.25e6, 0.5e6, 1e6, 2e6),
    "1M": (0.25e6, 0.5e6, 1e6),
    "2M": (0.25e6, 0.5e6),
}
FINAL = ("2M", 1e6)
REPEATED, EPOCHS = ("0.5M", 1e6), (4, 16, 64)
_HELD_OUT_DOCUMENTS = 150
RECIPE = f"""\
objective = "pretrain"

[data]
seq_len = {SEQ_LEN}

[optim]
name = "muon"
muon_lr = 0.02
lr = 3e-3
weight_decay = 0.0

[schedule]
name = "wsd"
warmup = 0.05
decay = 0.4
final = 0.0

[training]
global_batch_size = {BATCH}
log_every = 50

[validation]
every = 1000000            # only at the end
num_sequences = 400

[checkpoint]
every = 500
keep = 1
keep_best = false
"""


def train(work: Path, data: Sequence[str]) -> None:
    """Write texts, tokenizer, recipe and runs to `work`."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "recipe.toml").write_text(RECIPE, "utf-8")
    if not (work / "unique.json").is_file():
        write_texts(work, data)
    for shape, tokens in TOKENS.items():
        sweep(work, f"law-{shape}", shape, tokens)
    sweep(work, "final", FINAL[0], [FINAL[1]])
    for epochs in EPOCHS:
        source = f"repeated-{epochs}.jsonl"
        sweep(work, f"repeated-{epochs}", REPEATED[0], [REPEATED[1]], source)


def write_texts(work: Path, data: Sequence[str]) -> None:
    """Write held-out and training texts, a tokenizer, and the parts that are repeated."""
    from minimind.data.input_files import list_files
    from minimind.data.invalid import InvalidRecords
    from minimind.data.read import read_texts
    from minimind.tokenizer import Tokenizer

    files = [file for path in data for file in list_files(path)]
    texts = sorted(set(read_texts(files, invalid=InvalidRecords())))
    random.Random(0).shuffle(texts)
    held_out, texts = texts[:_HELD_OUT_DOCUMENTS], texts[_HELD_OUT_DOCUMENTS:]
    _write(work / "held-out.jsonl", held_out)
    _write(work / "train.jsonl", texts)
    arguments = [str(work / "train.jsonl"), "--vocab-size", str(VOCAB), "--sample-mb", "3"]
    arguments += ["--out", str(work / "tokenizer")]
    subprocess.run([sys.executable, "-m", "minimind", "tokenizer", "train", *arguments], check=True)
    tokenizer = Tokenizer.load(work / "tokenizer")
    lengths = [len(ids) + 1 for ids in tokenizer.encode_batch(texts)]  # and the token that ends it
    unique = {"all": sum(lengths)}
    for epochs in EPOCHS:
        count = taken = 0
        while taken < REPEATED[1] / epochs:
            taken += lengths[count]
            count += 1
        _write(work / f"repeated-{epochs}.jsonl", texts[:count])
        unique[str(epochs)] = taken
    (work / "unique.json").write_text(json.dumps(unique), "utf-8")


def _write(path: Path, texts: Iterable[str]) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), "utf-8")


def sweep(
    work: Path, name: str, shape: str, tokens: Sequence[float], source: str = "train.jsonl"
) -> None:
    """Run one sweep, or continue it: two runs at a time with one thread each."""
    width, inner, layers = SHAPES[shape]
    heads = width // HEAD_DIM
    settings = [f"hidden_size={width}", f"intermediate_size={inner}", f"num_hidden_layers={layers}"]
    settings += [f"num_attention_heads={heads}", f"num_key_value_heads={heads}"]
    settings += [f"head_dim={HEAD_DIM}", f"max_position_embeddings={SEQ_LEN}"]
    steps = ",".join(str(round(count / SEQ_LEN / BATCH)) for count in tokens)
    arguments = [str(work / "recipe.toml"), *(f"model.{setting}" for setting in settings)]
    arguments += [f"training.steps={steps}", f"data.store={work / 'stores'}"]
    arguments += [f"data.validation={json.dumps([str(work / 'held-out.jsonl')])}"]
    arguments += ["--data", str(work / source), "--tokenizer", str(work / "tokenizer")]
    arguments += ["--devices", "cpu,cpu", "--out", str(work / name)]
    subprocess.run(
        [sys.executable, "-m", "minimind", "sweep", *arguments],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def record(work: Path, out: Path) -> None:
    """Fit the law to the short runs and write OUT.json, OUT.md and OUT.svg."""
    from minimind.reporting.runs import find_runs

    unique = json.loads((work / "unique.json").read_text("utf-8"))
    samples = scaling_law.read_samples([work / f"law-{shape}" for shape in TOKENS])
    law, resampled = scaling_law.fit_law(samples)
    [final] = find_runs([work / "final"]).runs
    result: dict[str, Any] = {
        "command": "python -m benchmarks.small_law --work DIR train DATA…; … record",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared with other work",
        "unique_tokens": unique["all"],
        "unigram_bits_per_byte": final.summary["unigram_bits_per_byte"],
        **scaling_law.fitted(law, resampled, samples),
        "predictions": [],
        "final": scaling_law.check(law, resampled, final, None),
        "repeated": [
            {"epochs": epochs, "unique": unique[str(epochs)]}
            | scaling_law.check(law, resampled, run, unique[str(epochs)])
            for epochs in EPOCHS
            for run in find_runs([work / f"repeated-{epochs}"]).runs
        ],
        "recipe": RECIPE,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, ensure_ascii=False, indent=1)
    out.with_suffix(".json").write_text(text + "\n", "utf-8")
    page = "\n".join([*scaling_law.describe(result), *describe_repeated(result)]) + "\n"
    out.with_suffix(".md").write_text(page.replace("(law.svg)", f"({out.name}.svg)"), "utf-8")
    out.with_suffix(".svg").write_text(scaling_law.plot(law, samples, []), "utf-8")


def describe_repeated(result: dict[str, Any]) -> list[str]:
    """Return the setting of the runs, and the section on repeated data, as Markdown."""
    lines = [
        "",
        "Real Chinese text (encyclopaedia, web pages, news, essays), a tokenizer of "
        f"{VOCAB:,} tokens, {result['unique_tokens'] / 1e6:.1f}M tokens in all; {result['machine']}"
        ". The speeds are those of a busy machine. One seed, one learning rate for all sizes. The "
        f"recipe is in the JSON file. A unigram model has {result['unigram_bits_per_byte']:.3f} "
        "bits per byte.",
        "",
        "## Repeated data",
        "",
        "The same number of tokens from ever fewer unique ones; predictions by `effective_tokens`.",
        "",
    ]
    rows = [
        [
            f"{run['epochs']}",
            f"{run['unique'] / 1e6:.2f}M",
            f"{run['tokens'] / 1e6:.2f}M",
            f"{run['bits_per_byte']:.4f}",
            f"{run['predicted']:.4f}",
            f"{run['error']:+.1%}",
        ]
        for run in result["repeated"]
    ]
    head = ["epochs", "unique tokens", "tokens", "bits per byte", "predicted", "error"]
    return [*lines, *table(head, rows)]


def main() -> None:
    """Run `train` or `record`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train").add_argument("data", nargs="+")
    out = Path("benchmarks/records/small-law")
    commands.add_parser("record").add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    if args.command == "train":
        train(args.work, args.data)
    else:
        record(args.work, args.out)


if __name__ == "__main__":
    main()
