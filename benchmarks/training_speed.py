"""Training speed of minimind, of another checkout of it, and of Hugging Face's Trainer, in turns.

    pip install -c constraints.txt -e '.[bench]'
    python -m benchmarks.training_speed [--checkout DIR] [--case small-16x512 …] [--quick]

All train the same model shape on the same documents with at most as many tokens per step. minimind
and `--checkout`, another checkout (in its own environment DIR/.venv if it has one), run their own
recipes. `Trainer` trains `LlamaForCausalLM`: on one document per row, truncated to the sequence
length and padded to the longest row of the batch, in float32 (the default of its users) and with
`bf16=True`; and on documents that are concatenated and cut into full rows, with `bf16=True`.

Documents have random lengths: log-normal with a median of a quarter of the sequence length; with
--data, documents of files. Conversations have one or more turns of the textbook,
and fit into a sequence. Real tokens per second
count no padding; a measurement is the median over the steps except the first. Utilisation is the
FLOPs of the model per second (`planning.plan.flops_per_token`) divided by those of the fastest bf16
matrix product in the same round on the same threads.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from operator import truediv
from pathlib import Path
from typing import Any

from benchmarks.rounds import (
    Contender,
    add_options,
    answer_requests,
    comparison,
    measure_in_turns,
    over_rounds,
    recording,
    this_script,
    use_checkout,
)

_NUM_DOCUMENTS = 3_000
_CHARACTERS_PER_TOKEN = 1.7  # of the textbook, about
_TOKENS_PER_TURN = 40  # a question and its answer, about
_COLUMNS = {
    "real_tokens_per_second": ("real tokens/s", 0),
    "utilisation": ("of attainable", 3),
    "filled": ("not padding", 3),
    "peak_mb": ("peak MB", 0),
}


@dataclass(frozen=True)
class Case:
    """A model shape, and the sequences and tokens per sequence of a step."""

    preset: str
    rows: int
    seq_len: int
    objective: str = "pretrain"

    @property
    def name(self) -> str:
        suffix = "" if self.objective == "pretrain" else f"-{self.objective}"
        return f"{self.preset}-{self.rows}x{self.seq_len}{suffix}"


_SHAPES = (("small", 16, 512), ("small", 32, 256), ("demo", 64, 128))
CASES = {
    case.name: case
    for case in (Case(*shape, goal) for goal in ("pretrain", "sft") for shape in _SHAPES)
}
QUICK = Case("nano", 4, 64), Case("nano", 4, 64, "sft")
TRAINERS = {  # of Hugging Face: bf16, packed
    "Trainer": (False, False),
    "Trainer bf16": (True, False),
    "Trainer bf16 packed": (True, True),
}


def main() -> None:
    """Measure every case, print a table for each, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    parser.add_argument("--checkout", type=Path, help="folder of another checkout of minimind")
    parser.add_argument("--case", nargs="*", choices=CASES, help="default: all")
    parser.add_argument("--data", nargs="*", default=[], help="files of texts for pretraining")
    parser.add_argument("--steps", type=int, default=5, help="per measurement, warm-up included")
    parser.add_argument("--only", nargs="*", help="contenders; default: all")
    args = parser.parse_args()
    if args.contender:
        answer(args)
        return
    cases = QUICK if args.quick else [CASES[name] for name in args.case or CASES]
    with recording(args, "transformers", "accelerate") as record:
        record |= {"documents": args.data or "textbook", "over_rounds": {}, "rounds": {}}
        lines: list[str] = []
        for case in cases:
            with tempfile.TemporaryDirectory() as work:
                args.work = Path(work)
                flops = prepare(args, case)
                rounds = measure_in_turns(
                    contenders(args), 1 if args.quick else args.rounds, args.threads, args.work
                )
            attainable = rounds.pop("attainable")
            for measured in rounds.values():
                for metrics, ceiling in zip(measured, attainable, strict=True):
                    used = metrics["real_tokens_per_second"] * flops
                    metrics["utilisation"] = used / (1e12 * ceiling["bf16_tflops"])
            record["rounds"][case.name] = rounds | {"attainable": attainable}
            record["over_rounds"][case.name] = over_rounds(record["rounds"][case.name])
            lines += describe(case, rounds, record["over_rounds"][case.name]["attainable"])
        record["markdown"] = lines


def describe(case: Case, rounds: Any, attainable: dict[str, dict[str, float]]) -> list[str]:
    """Return a heading, the attainable rates and the table of a case."""
    reference = next(iter(rounds))
    table = comparison(rounds, _COLUMNS, metric="real_tokens_per_second", reference=reference)
    rates = ", ".join(
        f"{key.removesuffix('_tflops')} {attainable[key]['median']:.2f}"
        for key in ("bf16_tflops", "fp32_tflops")
    )
    return [f"## {case.name}", "", f"Attainable TFLOP/s: {rates}.", "", *table, ""]


def contenders(args: argparse.Namespace) -> list[Contender]:
    """Return the selected contenders, minimind first."""
    names = ["minimind", *(["checkout"] if args.checkout else []), *TRAINERS]
    names = [name for name in names if not args.only or name in args.only]
    return [
        this_script(args, name, args.checkout.resolve() if name == "checkout" else None)
        for name in (*names, "attainable")
    ]


def answer(args: argparse.Namespace) -> None:
    """Measure this contender on request."""
    case = Case(**json.loads((args.work / "facts.json").read_text("utf-8"))["case"])
    if args.contender == "attainable":
        answer_requests(attainable)
    elif args.contender in TRAINERS:
        bf16, packed = TRAINERS[args.contender]
        answer_requests(partial(trainer, args, case, bf16=bf16, packed=packed))
    else:
        use_checkout(args.checkout if args.contender == "checkout" else None)
        answer_requests(partial(minimind, args, case))


def prepare(args: argparse.Namespace, case: Case) -> int:
    """Write the case, the data and a tokenizer; return the FLOPs of the model per token.

    data.jsonl: documents or conversations. rows.json: their tokens and loss masks, cut to the
    sequence length, for Trainer.
    """
    import torch

    from minimind.config.settings import ModelSettings
    from minimind.model import Transformer
    from minimind.planning.plan import flops_per_token
    from minimind.tokenizer import train_tokenizer
    from minimind.tokenizer.chat import encode_chats

    texts = _documents(args.data, case.seq_len)
    vocab = {"nano": 600, "demo": 3200}.get(case.preset, 6400)  # as in the recipes
    tokenizer = train_tokenizer(texts, vocab_size=vocab)
    tokenizer.save(args.work / "tokenizer")
    records: list[dict[str, Any]]
    if case.objective == "sft":
        conversations = _conversations(case.seq_len)
        encoded = encode_chats(tokenizer, conversations)
        fits = [len(ids) <= case.seq_len for ids, _ in encoded]
        rows = [row for row, fit in zip(encoded, fits, strict=True) if fit]
        records = [
            {"conversations": x} for x, kept in zip(conversations, fits, strict=True) if kept
        ]
    else:
        ids = [[*x, tokenizer.end_of_text][: case.seq_len] for x in tokenizer.encode_batch(texts)]
        rows = [(x, [1] * len(x)) for x in ids]
        records = [{"text": text} for text in texts]
    with (args.work / "data.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(x, ensure_ascii=False) + "\n" for x in records)
    facts = {
        "case": vars(case),
        "vocab_size": tokenizer.vocab_size,
        "tokens_per_label": sum(len(x) for x, _ in rows) / sum(sum(mask) for _, mask in rows),
    }
    (args.work / "facts.json").write_text(json.dumps(facts), "utf-8")
    (args.work / "rows.json").write_text(json.dumps(rows), "utf-8")
    with torch.device("meta"):
        model = Transformer(ModelSettings(preset=case.preset).shape(tokenizer.vocab_size))
    return flops_per_token(model, case.seq_len)


def _documents(data: list[str], seq_len: int) -> list[str]:
    """Return documents of files, or of the textbook with random lengths."""
    from minimind.data.input_files import list_files
    from minimind.data.invalid import InvalidRecords
    from minimind.data.read import read_texts
    from minimind.data.textbook import prose

    rng = random.Random(0)
    if data:
        files = [file for path in data for file in list_files(path)]
        texts = list(read_texts(files, invalid=InvalidRecords()))
        return rng.sample(texts, min(len(texts), _NUM_DOCUMENTS))
    documents, sentences = [], prose(1)
    for _ in range(_NUM_DOCUMENTS):
        characters = _CHARACTERS_PER_TOKEN * seq_len / 4 * rng.lognormvariate(0, 0.8)
        parts = [next(sentences)]
        while sum(map(len, parts)) < characters:
            parts.append(next(sentences))
        documents.append("\n".join(parts))
    return documents


def _conversations(seq_len: int) -> list[list[dict[str, Any]]]:
    """Return conversations of 1 turn up to about as many as fit into a sequence."""
    from minimind.data.textbook import dialogues

    rng, turns = random.Random(0), dialogues(1, "single")
    return [
        [
            message
            for turn in islice(turns, rng.randint(1, max(1, seq_len // _TOKENS_PER_TURN)))
            for message in turn
            if message["role"] != "system"
        ]
        for _ in range(_NUM_DOCUMENTS)
    ]


def attainable() -> dict[str, float]:
    """Measure the fastest matrix products."""
    import torch

    from minimind.planning.attainable import attainable_flops

    device = torch.device("cpu")
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    return {
        f"{name}_tflops": attainable_flops(device, dtype) / 1e12 for name, dtype in dtypes.items()
    }


def minimind(args: argparse.Namespace, case: Case) -> dict[str, float]:
    """Train a new run for a few steps: recipe, training loop, token store.

    This function also drives checkouts whose settings and metrics have older names.
    """
    from minimind.config import load_recipe
    from minimind.config.settings import DataSettings
    from minimind.training.reporter import Reporter
    from minimind.training.stage import run_stage

    is_old = "window" in DataSettings.model_fields
    run = args.work / f"run-{time.time_ns()}"
    flags = {
        "out": str(run),
        "tokenizer": str(args.work / "tokenizer"),
        "device": "cpu",
        "model.preset": case.preset,
        "data.sources": [str(args.work / "data.jsonl")],
        "data.store": str(args.work / f"stores-{args.contender}"),
        "data.window" if is_old else "data.seq_len": case.seq_len,
        "data.validation_fraction": 0.0,
        "training.batch" if is_old else "training.global_batch_size": case.rows,
        "training.steps": args.steps,
        "training.log_every": 1,
        "validation.every": 10_000,
        "checkpoint.every": 10_000,
    }
    recipe = load_recipe(f"{case.objective}-small", flags=flags).recipe
    run_stage(recipe, reporter=Reporter())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    seconds = [end["elapsed_s"] - start["elapsed_s"] for start, end in pairwise(steps)]
    # Older versions count padding as tokens, so real tokens are derived from the supervised ones.
    per_label = json.loads((args.work / "facts.json").read_text())["tokens_per_label"]
    real = [per_label * step["learned" if is_old else "num_label_tokens"] for step in steps[1:]]
    return {
        "real_tokens_per_second": statistics.median(map(truediv, real, seconds)),
        "filled": statistics.mean(real) / (case.rows * case.seq_len),
    }


def trainer(args: argparse.Namespace, case: Case, *, bf16: bool, packed: bool) -> dict[str, float]:
    """Train with the Trainer of Hugging Face for a few steps, from the first weights."""
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from minimind.config.settings import ModelSettings

    rows = json.loads((args.work / "rows.json").read_text())
    vocab = json.loads((args.work / "facts.json").read_text())["vocab_size"]
    shape = ModelSettings(preset=case.preset).shape(vocab)
    config = LlamaConfig(**shape.model_dump(exclude={"qk_norm", "rope_theta"}))
    if packed:
        rows = _concatenated(rows, case.seq_len)
    batches: list[tuple[int, int]] = []  # real tokens, tokens

    def collate(examples: list[list[list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(ids) for ids, _ in examples)
        ids = torch.zeros(len(examples), longest, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, (tokens, supervised) in enumerate(examples):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            learned = torch.tensor(supervised).bool()
            labels[row, : len(tokens)][learned] = torch.tensor(tokens)[learned]
        batches.append((int(mask.sum()), mask.numel()))
        batch = {"input_ids": ids, "labels": labels}
        return batch if packed else batch | {"attention_mask": mask}

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *rest: Any, **more: Any) -> None:
            ends.append(time.perf_counter())

    Trainer(
        model=LlamaForCausalLM(config),
        args=TrainingArguments(
            output_dir=str(args.work / "trainer"),
            per_device_train_batch_size=case.rows,
            max_steps=args.steps,
            bf16=bf16,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=rows,
        data_collator=collate,
        callbacks=[Clock()],
    ).train()
    counted = batches[1 : len(ends)]  # the first step warms up
    seconds = [end - before for before, end in pairwise(ends)]
    rates = [real / step_s for (real, _), step_s in zip(counted, seconds, strict=True)]
    return {
        "real_tokens_per_second": statistics.median(rates),
        "filled": sum(real for real, _ in counted) / sum(size for _, size in counted),
    }


def _concatenated(rows: list[list[list[int]]], seq_len: int) -> list[list[list[int]]]:
    """Concatenate documents and cut them into full rows, as `run_clm.py` of transformers does."""
    ids = [token for tokens, _ in rows for token in tokens]
    mask = [flag for _, flags in rows for flag in flags]
    starts = range(0, len(ids) - seq_len + 1, seq_len)
    return [[ids[start : start + seq_len], mask[start : start + seq_len]] for start in starts]


if __name__ == "__main__":
    main()
