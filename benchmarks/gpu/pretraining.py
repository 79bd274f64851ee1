"""Pretraining of `small` on real text for some minutes, then fine-tuning and eight questions."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import Context

_TOKENIZER_MB = 12  # text that the tokenizer is trained on
_TRIAL_STEPS = 30
_SAVE_EVERY_S = 5
_TOKENS_PER_STEP = {"pretrain": 128 * 512, "sft": 64 * 512}  # of pretrain-small and sft-small
QUESTIONS = [
    "你叫什么名字？",
    "中国的首都是哪里？",
    "海水为什么是咸的？",
    "请介绍一下长江。",
    "一年有几个季节？",
    "怎样才能学好英语？",
    "写一首关于春天的短诗。",
    "What is the capital of France?",
]


def prepare(context: Context) -> None:
    """Train the tokenizer and build the token stores, on the CPU alone."""
    started, tokenizer = time.perf_counter(), context.work / "tokenizer"
    context.measure("tokenizer", lambda: _train_tokenizer(context, tokenizer))
    context.measure("text store", lambda: _build_store(context, "pretrain", context.texts))
    if context.chats:
        context.measure("chat store", lambda: _build_store(context, "sft", context.chats))
    context.save("seconds", round(time.perf_counter() - started, 1))


def _train_tokenizer(context: Context, folder: Path) -> dict[str, Any]:
    """Train on an even sample of all files."""
    from itertools import islice

    from minimind.data.input_files import list_files
    from minimind.data.invalid import InvalidRecords
    from minimind.data.read import read_texts
    from minimind.tokenizer import train_tokenizer

    started = time.perf_counter()
    files = [file for path in context.texts for file in list_files(path)]
    texts: list[str] = []
    per_file = _TOKENIZER_MB * 1_000_000 // 3 // max(1, len(files))  # characters
    for file in files:
        characters = 0
        for text in islice(read_texts([file], invalid=InvalidRecords()), 0, None, 3):
            texts.append(text)
            characters += len(text)
            if characters > per_file:
                break
    trained = train_tokenizer(texts, vocab_size=600 if context.tiny else 6400)
    trained.save(folder)
    return {"tokens": trained.vocab_size, "seconds": time.perf_counter() - started}


def _settings(context: Context, objective: str, sources: list[str]) -> dict[str, Any]:
    """Return the settings of a stage by dotted key."""
    settings: dict[str, Any] = {
        "device": context.device,
        "data.sources": sources,
        "data.store": str(context.work / "stores"),
        "validation.every": 400,
        "checkpoint.every": 100_000,
        "training.log_every": 10,
    }
    if objective == "pretrain":
        settings["tokenizer"] = str(context.work / "tokenizer")
    if context.tiny:
        settings |= {
            "data.seq_len": 32,
            "training.global_batch_size": 4,
            "data.validation_fraction": 0.1,
            "validation.num_sequences": 4,
            "validation.prompts": ["长江是"],
        }
        if objective == "pretrain":
            settings["model.preset"] = "nano"
    return settings


def _build_store(context: Context, objective: str, sources: list[str]) -> dict[str, Any]:
    from minimind.config import load_recipe
    from minimind.training.build import load_tokenizer
    from minimind.training.datasets import build_datasets, open_stores
    from minimind.training.reporter import Reporter

    started = time.perf_counter()
    flags = _settings(context, objective, sources) | {
        "tokenizer": str(context.work / "tokenizer"),
        "device": "cpu",
    }
    recipe = load_recipe(f"{objective}-small", flags=flags).recipe
    tokenizer = load_tokenizer(recipe)
    assert tokenizer is not None
    stores = open_stores(recipe, tokenizer, Reporter())
    datasets = build_datasets(recipe, tokenizer, stores, Reporter())
    return {
        "sequences": datasets.train.order.epoch_size,
        "seconds": time.perf_counter() - started,
    }


def run(context: Context) -> None:
    """Pretrain for `context.seconds`, then fine-tune for a quarter of it and ask questions."""
    pretrained, tuned = context.work / "pretrained", context.work / "tuned"
    with context.isolated("pretrain"):
        seconds = context.seconds
        rate = _steps_per_second(context, "pretrain", context.texts, None)
        context.save("pretrain steps per second, expected", rate)
        steps = max(6, int(rate * seconds))
        context.save("pretrain", _train(context, "pretrain", context.texts, pretrained, steps))
    if context.chats and (pretrained / "model").is_dir():
        with context.isolated("sft"):
            rate = _steps_per_second(context, "sft", context.chats, pretrained)
            context.save("sft steps per second, expected", rate)
            steps = max(6, int(rate * context.seconds / 4))
            context.save("sft", _train(context, "sft", context.chats, tuned, steps, pretrained))
        context.measure("answers", lambda: _answers(context, tuned))


def _steps_per_second(
    context: Context, objective: str, sources: list[str], model: Path | None
) -> float:
    """Return the speed that the part `training` measured, or else that of a trial."""
    speeds = context.work / "training.json"
    if speeds.is_file() and not context.tiny:
        measured = json.loads(speeds.read_text()).get(f"small {objective} 1", {})
        if rate := measured.get("real_tokens_per_second"):
            return float(rate) / _TOKENS_PER_STEP[objective]
    run_dir = context.work / f"trial-{objective}"
    steps = 4 if context.tiny else _TRIAL_STEPS
    _command(context, objective, sources, run_dir, steps, model, ["training.log_every=1"])
    lines = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    elapsed = [x["elapsed_s"] for x in lines if x["kind"] == "train"]
    return (steps // 2) / (elapsed[-1] - elapsed[steps - steps // 2 - 1])


def _train(
    context: Context,
    objective: str,
    sources: list[str],
    run_dir: Path,
    steps: int,
    model: Path | None = None,
) -> dict[str, Any]:
    """Train, write a report, and return the summary, the losses and the samples.

    The losses so far are saved meanwhile, since the part may run out of time.
    """

    def save_progress() -> None:
        unfinished = {"steps": steps, "unfinished": True}
        context.save(objective, unfinished | _curves(run_dir), show=False)

    started = time.perf_counter()
    _command(context, objective, sources, run_dir, steps, model, [], save_progress)
    seconds = time.perf_counter() - started
    report = context.work / f"{objective}-report.html"
    _minimind("report", str(run_dir), "--out", str(report))
    return {
        "steps": steps,
        "seconds_of_the_command": seconds,
        "summary": json.loads((run_dir / "summary.json").read_text()),
    } | _curves(run_dir)


def _curves(run_dir: Path) -> dict[str, Any]:
    """Return the losses, validations and last samples of a run, which may not have ended."""
    log = run_dir / "metrics.jsonl"
    complete = log.read_text("utf-8").rpartition("\n")[0] if log.is_file() else ""
    lines = [json.loads(x) for x in complete.split("\n") if x]  # samples may have other breaks
    curve = [
        {
            "step": x["step"],
            "loss": x.get("loss"),
            "bits_per_byte": x.get("bits_per_byte"),
            "tokens_per_second": x.get("tokens_per_second"),
            "kind": x["kind"],
        }
        for x in lines
        if x["kind"] in ("train", "validation")
    ]
    return {
        "curve": curve[:: max(1, len(curve) // 200)],
        "validation": [x for x in curve if x["kind"] == "validation"],
        "samples": [x for x in lines if x["kind"] == "sample"][-3:],
    }


def _command(
    context: Context,
    objective: str,
    sources: list[str],
    run_dir: Path,
    steps: int,
    model: Path | None,
    more: list[str],
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Run `minimind pretrain` or `sft`."""
    settings = _settings(context, objective, [])
    tokenizer = settings.pop("tokenizer", None)
    settings.pop("data.sources")
    overrides = [
        f"{key}={json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value}"
        for key, value in settings.items()
    ]
    command = [objective, f"{objective}-small", *overrides, f"training.steps={steps}", *more]
    for source in sources:
        command += ["--data", source]
    if tokenizer:
        command += ["--tokenizer", tokenizer]
    if model:
        command += ["--model", str(model)]
    _minimind(*command, "--out", str(run_dir), meanwhile=meanwhile)


def _minimind(*arguments: str, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Run a command of minimind, and call `meanwhile` every few seconds."""
    command = [sys.executable, "-m", "minimind", *arguments]
    print("$", " ".join(command), flush=True)
    with tempfile.TemporaryFile() as stream:
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        try:
            while True:
                try:
                    status = child.wait(_SAVE_EVERY_S)
                    break
                except subprocess.TimeoutExpired:
                    meanwhile()
        finally:
            child.kill()
        stream.seek(0)
        output = stream.read().decode(errors="replace")
    print(output[-6000:], flush=True)
    if status:
        raise RuntimeError(f"minimind {arguments[0]} failed: {output[-1500:]}")


def _answers(context: Context, run_dir: Path) -> list[dict[str, str]]:
    from minimind.api import load

    with load(run_dir, device=context.device) as model:
        return [
            {
                "question": question,
                "answer": model.chat(question, max_new_tokens=8 if context.tiny else 120, seed=0),
            }
            for question in QUESTIONS
        ]
