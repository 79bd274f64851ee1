"""Training speed and memory of minimind and a plain Hugging Face Trainer.

    pip install -c constraints.txt -e '.[bench]'
    python benchmarks/training_speed.py [--data FILES] [--preset small] [--seq-len 512]

Same model shape, tokenizer, documents and maximum number of tokens per step. The baseline is the
common setup: `Trainer` on `LlamaForCausalLM`, one document per row, truncated to the sequence
length and padded to the longest row of the batch (with "-fixed": to the sequence length). Only
supervised tokens count. Contenders run alternately, each in a separate process. A round is the
median over the steps except the first; the table shows the median and the spread of the rounds.
"""

import argparse
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from itertools import islice, pairwise
from pathlib import Path

from benchmarks.rounds import over_rounds, spread

CONTENDERS = ("minimind", "trainer-bf16", "trainer", "trainer-bf16-fixed")


def main() -> None:
    """Measure every contender, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="*", default=[], help="JSON lines; default: the textbook")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=16, help="sequences, or documents, per step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run = minimind if args.one == "minimind" else trainer
        metrics = run(args) | {"peak_rss_mb": _peak_mb()}
        (args.work / "metrics.json").write_text(json.dumps(metrics))
        return
    with tempfile.TemporaryDirectory() as work:
        args.work = Path(work)
        prepare(args)
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for _ in range(args.rounds):
            for name in CONTENDERS:
                command = [sys.executable, __file__, *sys.argv[1:], "--one", name, "--work", work]
                log = args.work / "log"
                with log.open("w") as stream:
                    done = subprocess.run(command, stderr=stream, stdout=stream)
                if done.returncode:
                    sys.exit(f"{name} failed:\n{log.read_text()[-3000:]}")
                rounds[name].append(json.loads((args.work / "metrics.json").read_text()))
                print(name, rounds[name][-1], flush=True)
    metrics = over_rounds(rounds)
    own = metrics["minimind"]["real_tokens_per_second"]["median"]
    head = f"{'real tokens/s':>14} {'spread':>15} {'packed':>7} {'peak MB':>8} {'ours':>9}"
    print(f"\n{'contender':20} {head}")
    for name, one in metrics.items():
        rate = one["real_tokens_per_second"]
        print(
            f"{name:20} {rate['median']:14,.0f} {spread(rate):>15} {one['fill']['median']:7.1%}"
            f" {one['peak_rss_mb']['median']:8,.0f} {own / rate['median']:7.2f} x"
        )
    print(f"data loading: {metrics['minimind']['data_wait_fraction']['median']:.2%} of a step")
    if args.json:
        record = {
            "date": date.today().isoformat(),
            "machine": machine(),
            "command": " ".join(["python", *sys.argv]),
            "documents": [Path(file).name for file in args.data] or "textbook prose",
            "over_rounds": metrics,
            "rounds": rounds,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def prepare(args: argparse.Namespace) -> None:
    """Write the documents of all contenders, and a tokenizer of 6,400 tokens trained on them."""
    from minimind.data.input_files import list_files
    from minimind.data.invalid import InvalidRecords
    from minimind.data.read import read_texts
    from minimind.data.textbook import prose
    from minimind.tokenizer import train_tokenizer

    files = [file for path in args.data for file in list_files(path)]
    texts = list(read_texts(files, invalid=InvalidRecords()) if files else _textbook(prose(1)))
    texts = random.Random(0).sample(texts, min(len(texts), 10_000))
    with (args.work / "texts.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
    train_tokenizer(texts).save(args.work / "tokenizer")


def _textbook(sentences):
    """Yield documents of 4 to 15 textbook paragraphs."""
    for number in range(5_000):
        yield "\n".join(islice(sentences, 4 + number % 12))


def minimind(args: argparse.Namespace) -> dict[str, float]:
    """Measure minimind: recipe, training loop, token store."""
    from minimind.config import load_recipe
    from minimind.training.reporter import Reporter
    from minimind.training.stage import run_stage

    run = args.work / f"run-{time.time_ns()}"
    flags = {
        "out": str(run),
        "tokenizer": str(args.work / "tokenizer"),
        "device": args.device,
        "model.preset": args.preset,
        "data.sources": [str(args.work / "texts.jsonl")],
        "data.store": str(args.work / "stores"),
        "data.seq_len": args.seq_len,
        "data.validation_fraction": 0.0,
        "training.global_batch_size": args.rows,
        "training.steps": args.steps,
        "training.log_every": 1,
        "validation.every": 10_000,
        "checkpoint.every": 10_000,
    }
    run_stage(load_recipe("pretrain-small", flags=flags).recipe, reporter=Reporter())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n") if line]
    steps = [line for line in lines if line["kind"] == "train"][1:]  # the first one warms up
    return {
        "real_tokens_per_second": statistics.median(s["tokens_per_second"] for s in steps),
        "fill": statistics.mean(s["num_label_tokens"] for s in steps) / (args.rows * args.seq_len),
        "data_wait_fraction": statistics.median(s["data_wait_fraction"] for s in steps),
    }


def trainer(args: argparse.Namespace) -> dict[str, float]:
    """Measure the Hugging Face Trainer on a list of documents."""
    import torch
    from transformers import (
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from minimind.config.settings import ModelSettings

    tokenizer = AutoTokenizer.from_pretrained(args.work / "tokenizer")
    shape = ModelSettings(preset=args.preset).shape(len(tokenizer))
    config = LlamaConfig(**shape.model_dump(exclude={"qk_norm", "rope_theta"}))
    rows, fixed = [], args.one.endswith("fixed")
    with (args.work / "texts.jsonl").open(encoding="utf-8") as stream:
        for line in islice(stream, args.rows * (args.steps + 1)):
            text = json.loads(line)["text"] + tokenizer.eos_token
            rows.append(
                tokenizer(
                    text,
                    truncation=True,
                    max_length=args.seq_len,
                    padding="max_length" if fixed else False,
                )
            )
    batches: list[tuple[int, int]] = []

    class Counting(DataCollatorForLanguageModeling):
        def torch_call(self, examples):
            batch = super().torch_call(examples)
            real = int(batch["attention_mask"].sum())
            batches.append((real, batch["attention_mask"].numel()))
            return batch

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *rest, **more):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    Trainer(
        model=LlamaForCausalLM(config),
        args=TrainingArguments(
            output_dir=str(args.work / "trainer"),
            per_device_train_batch_size=args.rows,
            max_steps=args.steps,
            bf16="bf16" in args.one,
            use_cpu=args.device == "cpu",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=rows,
        data_collator=Counting(tokenizer, mlm=False),
        callbacks=[Clock()],
    ).train()
    counted = batches[1 : len(ends)]  # the first one warms up
    seconds = [end - before for before, end in pairwise(ends)]
    rates = [real / s for (real, _), s in zip(counted, seconds, strict=True)]
    return {
        "real_tokens_per_second": statistics.median(rates),
        "fill": sum(real for real, _ in counted) / sum(padded for _, padded in counted),
    }


def machine() -> str:
    """Describe this machine: processor, cores, torch version."""
    import os

    import torch

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        model = next((x.split(": ")[1] for x in lines if x.startswith("model name")), model)
    flags = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} cores, {model}, {flags}, torch {torch.__version__}"


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
