"""Bits per byte at contexts longer than a model was trained at, by kind of RoPE scaling.

    python benchmarks/long_context.py --work DIR train      # minutes on 2 CPU cores
    python benchmarks/long_context.py --work DIR measure --out benchmarks/records/long-context

`train` gathers the source files of the Python standard library that runs this script (whole files
are real documents of many thousand tokens, anybody has them, and names far back help), trains a
tokenizer, and a model of 1M parameters with a window of 512. `measure` reads held-out files of
at least 4,096 tokens with windows of 512, 1,024, 2,048 and 4,096 tokens, and writes the bits per
byte of each kind of scaling: by length of window, and by position within the longest one.
"""

import argparse
import hashlib
import json
import sysconfig
from pathlib import Path

TRAINED_AT = 512
HELD_OUT = 12  # one file of so many, chosen by the hash of its text


def documents() -> tuple[list[str], list[str]]:
    """(for training, held out): the texts of the standard library's source files."""
    sides: tuple[list[str], list[str]] = ([], [])
    seen = set()
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        inside = path.relative_to(sysconfig.get_path("stdlib")).parts
        if inside[0] in ("site-packages", "lib2to3", "encodings") or "idlelib" in inside:
            continue  # not of the library, or tables
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # a test of other encodings
        key = hashlib.sha256(text.encode()).digest()
        if len(text) > 500 and key not in seen:
            seen.add(key)
            sides[key[0] % HELD_OUT == 0].append(text)
    return sides


def train(work: Path) -> None:
    """Data, tokenizer and model, each kept in `work`."""
    from minimind.cli.console import RichReporter
    from minimind.config import Recipe
    from minimind.tokenizer import train_tokenizer
    from minimind.training.stage import run_stage

    work.mkdir(parents=True, exist_ok=True)
    learned, held_out = documents()
    for name, texts in (("learned", learned), ("held-out", held_out)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (work / f"{name}.jsonl").write_text(lines, "utf-8")
    train_tokenizer(learned, vocab_size=2048).save(work / "tokenizer")
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
                "sources": [str(work / "learned.jsonl")],
                "validation": [str(work / "held-out.jsonl")],
                "window": TRAINED_AT,
                "store": str(work / "stores"),
            },
            "optim": {"muon_lr": 0.02, "lr": 3e-3, "weight_decay": 0.0},
            "schedule": {"name": "wsd", "warmup": 0.03, "decay": 0.4, "final": 0.0},
            "training": {"steps": 500, "batch": 16},
            "validation": {"every": 250},
            "checkpoint": {"every": 100, "keep": 1},
        }
    )
    run_stage(recipe, reporter=RichReporter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("what", choices=["train", "measure"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/records/long-context"))
    arguments = parser.parse_args()
    if arguments.what == "train":
        train(arguments.work)


if __name__ == "__main__":
    main()
