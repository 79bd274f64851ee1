"""Training speed on random documents, against Hugging Face's Trainer, in turns."""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import Context

_CAP_BYTES = 2 << 30  # memory of a small graphics card


@dataclass(frozen=True)
class Case:
    """A model and the sizes of a step; rows are sequences of seq_len tokens."""

    preset: str
    rows: int
    seq_len: int = 512
    micro_batch: int | None = None
    steps: int = 30
    log_every: int = 10
    objective: str = "pretrain"
    compile: bool = False
    activation_checkpointing: bool = False
    dense_mask: bool = False  # for packed conversations: no variable-length attention

    @property
    def name(self) -> str:
        words = [self.preset, self.objective, "compiled" if self.compile else ""]
        words += ["dense mask" if self.dense_mask else ""]
        return " ".join(word for word in words if word)


CASES = [Case("small", 128), Case("base", 256, steps=16, log_every=4), Case("moe", 128)]
TINY_CASES = [
    Case(preset, 4, seq_len=32, micro_batch=2, steps=4, log_every=2)
    for preset in ("nano", "nano-moe")
]


def run(context: Context) -> None:
    """Measure every preset in turns with Trainer, packed conversations, and torch.compile."""
    cases = TINY_CASES if context.tiny else CASES
    context.measure("attainable", lambda: attainable(context))
    for case in cases:
        for round_number in (1, 2):
            context.measure(f"{case.name} {round_number}", lambda c=case: minimind(context, c))
            for packed in (False, True):
                name = f"{case.preset} Trainer{' packed' * packed} {round_number}"
                context.measure(name, lambda c=case, p=packed: trainer(context, c, packed=p))
    small = cases[0]
    for dense in (False, True):
        case = replace(small, objective="sft", dense_mask=dense)
        context.measure(f"{case.name} 1", lambda c=case: minimind(context, c))

    def measure_compiled(case: Case) -> None:
        compiled = replace(case, compile=True)
        context.measure(f"{compiled.name} 1", lambda: minimind(context, compiled))

    measure_compiled(small)
    measure_compiled(replace(small, objective="sft"))
    context.measure(
        f"{small.preset} Trainer packed compiled 1",
        lambda: trainer(context, small, packed=True, compiled=True),
    )
    for case in cases[1:] if not context.tiny else []:
        measure_compiled(case)


def run_capped(context: Context) -> None:
    """Train on a card of 2 GiB, with the micro-batch size that the planner chooses.

    `base` fits with activation checkpointing only, and `moe` does not fit.
    """
    import torch

    from minimind.planning.plan import PROCESS_BYTES

    allowed = _CAP_BYTES - PROCESS_BYTES["cuda"]
    if context.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(allowed / total)
    small, base, *_ = TINY_CASES if context.tiny else CASES
    for case, recompute in ((small, False), (small, True), (base, True)):
        capped = replace(case, activation_checkpointing=recompute, steps=8, log_every=2)
        name = f"{case.preset}{' recomputed' * recompute}"
        context.measure(name, lambda c=capped: minimind(context, c, cap=allowed))


def attainable(context: Context) -> dict[str, float]:
    """Measure a large bf16 matrix product and a large copy, the two ceilings of this device."""
    import torch

    size = 256 if context.tiny else 8192
    a, b = (torch.randn(size, size, device=context.device, dtype=torch.bfloat16) for _ in "ab")
    product_s = _median_seconds(context, lambda: a @ b)
    source = torch.randn((1 << 10) if context.tiny else (1 << 28), device=context.device)
    copied = torch.empty_like(source)
    copy_s = _median_seconds(context, lambda: copied.copy_(source))
    return {
        "bf16_tflops": 2 * size**3 / product_s / 1e12,
        "copy_gb_per_second": 2 * source.nbytes / copy_s / 1e9,
    }


def _median_seconds(context: Context, work: Any) -> float:
    import torch

    from minimind.planning.plan import timed

    device = torch.device(context.device)
    for _ in range(3):
        work()
    repeated = [timed(lambda: [work() for _ in range(5)], device) / 5 for _ in range(5)]
    return statistics.median(repeated)


def build(context: Context, case: Case, run_dir: Path, cap: int | None = None) -> Any:
    """Return a Trainer of minimind on random documents or conversations; it saves nothing."""
    import torch

    from minimind.config import load_recipe
    from minimind.data.packing import MixedDataset
    from minimind.model import Transformer
    from minimind.training.build import build_footprint
    from minimind.training.memory import choose_micro_batch
    from minimind.training.objectives.next_token import NextToken
    from minimind.training.precision import choose_precision
    from minimind.training.reporter import Reporter
    from minimind.training.trainer import Trainer

    vocab, device = 600 if context.tiny else 6400, torch.device(context.device)
    flags = {
        "objective": case.objective,
        "out": str(run_dir),
        "device": context.device,
        "model.preset": case.preset,
        "data.seq_len": case.seq_len,
        "training.steps": case.steps,
        "training.global_batch_size": case.rows,
        "training.log_every": case.log_every,
        "training.compile": case.compile,
        "training.activation_checkpointing": case.activation_checkpointing,
        "validation.every": 10_000,
        "checkpoint.every": 10_000,
    }
    recipe = load_recipe(None, flags=flags).recipe
    torch.manual_seed(0)
    with device:
        model = Transformer(recipe.model.shape(vocab))
    model.activation_checkpointing = case.activation_checkpointing
    micro_batch = choose_micro_batch(
        build_footprint(recipe, model, device),
        requested=case.micro_batch,
        num_sequences=case.rows,
        device=device,
        free=cap,
    )
    balance = recipe.training.router_aux_loss_coef
    tokens = case.rows * case.seq_len * (case.steps + 2)
    trainer = Trainer(
        model=model,
        objective=NextToken([2] * vocab, device, router_aux_loss_coef=balance),
        data=MixedDataset([sequences(case, vocab, tokens)], [1.0], seed=0),
        validation_data=None,
        recipe=recipe,
        run=run_dir,
        num_steps=case.steps,
        micro_batch_size=micro_batch,
        device=device,
        precision=choose_precision("auto", device),
        reporter=Reporter(),
    )
    trainer.save = lambda: None
    return trainer


def document_lengths(number: int, longest: int) -> list[int]:
    """Return lengths of random documents: log-normal, median a quarter of the sequence length."""
    import numpy as np

    lengths = np.random.default_rng(0).lognormal(np.log(longest / 4), 0.8, number)
    return [int(x) for x in np.clip(lengths, 4, longest)]


def sequences(case: Case, vocab: int, tokens: int) -> Any:
    """Return packed sequences of about `tokens` random tokens."""
    import numpy as np

    from minimind.data.packing import ChatSequences, TextSequences
    from minimind.data.store import Shard

    lengths = document_lengths(tokens // (case.seq_len // 4), case.seq_len)
    ends = np.cumsum(lengths)
    ids = np.random.default_rng(1).integers(10, vocab, int(ends[-1])).astype(np.uint16)
    if case.objective == "pretrain":
        return TextSequences([Shard(ids, None, ends)], case.seq_len)
    mask = np.concatenate([np.arange(n) >= n // 2 for n in lengths]).astype(np.uint8)
    return ChatSequences([Shard(ids, mask, ends)], case.seq_len, pad_id=0, seed=0)


def minimind(context: Context, case: Case, cap: int | None = None) -> dict[str, Any]:
    """Measure minimind's training loop."""
    import torch

    from minimind.planning.plan import flops_per_token
    from minimind.training import batch

    run_dir = Path(tempfile.mkdtemp(dir=context.work, prefix="run-"))
    trainer = build(context, case, run_dir, cap)
    supports_varlen = batch.supports_varlen
    if case.dense_mask:
        batch.supports_varlen = lambda device: False
    started = time.perf_counter()
    try:
        trainer.train()
    finally:
        batch.supports_varlen = supports_varlen
    seconds = time.perf_counter() - started
    lines = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [x for x in lines if x["kind"] == "train"]
    rate = statistics.median(x["tokens_per_second"] for x in steps[1:])
    flops = flops_per_token(trainer.model, case.seq_len, case.activation_checkpointing)
    return {
        "real_tokens_per_second": rate,
        "model_tflops": rate * flops / 1e12,
        "micro_batch": trainer.batch_sizes.train,
        "peak_memory_mb": (steps[-1]["peak_memory_bytes"] or 0) / 2**20,
        "reserved_mb": _reserved_mb(torch, context),
        "data_wait_fraction": statistics.median(x["data_wait_fraction"] for x in steps[1:]),
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "seconds_with_start": seconds,
        "precision": trainer.precision.name,
        "variable_length_attention": case.objective == "sft"
        and not case.dense_mask
        and supports_varlen(trainer.device),
    }


def _reserved_mb(torch: Any, context: Context) -> float:
    return torch.cuda.max_memory_reserved() / 2**20 if context.device == "cuda" else 0.0


def trainer(
    context: Context, case: Case, *, packed: bool, compiled: bool = False
) -> dict[str, Any]:
    """Measure Trainer on the same shape: padded documents, or rows without padding."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from minimind.config.settings import ModelSettings
    from minimind.model.hf_config import to_config_json

    vocab = 600 if context.tiny else 6400
    shape = ModelSettings(preset=case.preset).shape(vocab)
    folder = Path(tempfile.mkdtemp(dir=context.work, prefix="hf-"))
    (folder / "config.json").write_text(json.dumps(to_config_json(shape, "float32")))
    config = AutoConfig.from_pretrained(folder)
    rows_per_pass = min(case.rows, 32768 // case.seq_len)
    steps = 4 if context.tiny else 10
    number = case.rows * (steps + 1)
    lengths = [case.seq_len] * number if packed else document_lengths(number, case.seq_len)
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(10, vocab, (n,), generator=generator)} for n in lengths]
    counts: list[int] = []

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [x["input_ids"] for x in examples]
        counts.append(sum(len(x) for x in ids))
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.zeros_like(padded)
        for row, x in zip(mask, ids, strict=True):
            row[: len(x)] = 1
        labels = padded.masked_fill(mask == 0, -100)
        return {"input_ids": padded, "attention_mask": mask, "labels": labels}

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *rest: Any, **more: Any) -> None:
            if context.device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    if context.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    passes = case.rows // rows_per_pass
    Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=rows_per_pass,
            gradient_accumulation_steps=passes,
            max_steps=steps,
            bf16=context.device == "cuda",
            use_cpu=context.device == "cpu",
            torch_compile=compiled,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=rows,
        data_collator=collate,
        callbacks=[Clock()],
    ).train()
    first = steps // 2  # steps before it warm up
    tokens = sum(counts[first * passes : steps * passes])
    rate = tokens / (ends[-1] - ends[first - 1])
    peak = torch.cuda.max_memory_allocated() / 2**20 if context.device == "cuda" else 0.0
    return {"real_tokens_per_second": rate, "peak_memory_mb": peak}


def run_profile(context: Context) -> None:
    """Profile two optimizer steps of every preset: kernels by time, and the busy fraction."""
    cases = TINY_CASES if context.tiny else CASES
    profiled = [*cases, replace(cases[0], objective="sft")]
    for case in profiled:
        context.measure(case.name, lambda c=case: profile(context, c))


def profile(context: Context, case: Case) -> dict[str, Any]:
    """Return the kernels that take most time in two steps, and the fraction of busy time."""
    import contextlib

    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    from minimind.planning.plan import timed
    from minimind.training.batch import Prefetcher

    run_dir = Path(tempfile.mkdtemp(dir=context.work, prefix="run-"))
    trainer = build(context, replace(case, steps=12), run_dir)
    on_gpu = context.device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with contextlib.ExitStack() as stack:
        trainer._set_up(stack)
        trainer.model.train()
        trainer._prefetcher = stack.enter_context(contextlib.closing(Prefetcher(trainer.data)))
        timed(lambda: [trainer.train_step() for _ in range(3)], trainer.device)  # warmup
        plain_s = timed(lambda: [trainer.train_step() for _ in range(2)], trainer.device)
        with torch_profile(activities=activities) as profiler:
            for _ in range(2):
                trainer.train_step()
            if on_gpu:
                torch.cuda.synchronize()
    events = profiler.key_averages()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    if on_gpu:  # kernels, without the ranges of `record_function`
        cuda = torch.autograd.DeviceType.CUDA
        events = [e for e in events if e.device_type == cuda and not e.is_user_annotation]
    kernels = sorted(events, key=lambda e: -getattr(e, key))
    busy_s = sum(getattr(e, key) for e in kernels) / 1e6
    return {
        "seconds_of_two_steps": plain_s,
        "kernel_seconds": busy_s,
        "busy_fraction": busy_s / plain_s,
        "launches": sum(e.count for e in kernels),
        "kernels": [
            {"name": e.key[:110], "ms": round(getattr(e, key) / 1e3, 2), "calls": e.count}
            for e in kernels[:30]
        ],
    }
