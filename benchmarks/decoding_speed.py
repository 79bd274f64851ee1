"""Decoding speed and memory of minimind, transformers and llama.cpp.

    pip install -c constraints.txt -e '.[bench,llama-cpp]'
    python benchmarks/decoding_speed.py [--preset small] [--json FILE]

All use the same random weights, greedy decoding and no stop tokens. One stream: `--tokens` new
tokens after a prompt of `--prompt` tokens. 16 streams: the same with 16 different prompts in one
batch; llama.cpp is called through its C interface, like its server. The time includes prefill, but
not loading a model or allocating its KV cache.

Contenders run alternately, each in a separate process. A round is the median of three repetitions;
the table shows the median over the rounds and their spread. It also shows tokens per CPU second,
summed over cores, because other work on the machine affects them far less. Memory is the peak of
the process up to its first completion.
"""

import argparse
import contextlib
import functools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

from benchmarks.rounds import over_rounds, spread

CONTENDERS = {
    "minimind bf16": dict(run="minimind", dtype="bfloat16"),
    "minimind int8": dict(run="minimind", dtype="bfloat16", int8=True),
    "minimind fp32": dict(run="minimind", dtype="float32"),
    "transformers fp32": dict(run="transformers", dtype="float32"),
    "transformers bf16": dict(run="transformers", dtype="bfloat16"),
    "llama.cpp F16": dict(run="llama", file="F16"),
    "llama.cpp Q8_0": dict(run="llama", file="Q8_0"),
}
STREAMS = (1, 16)


def main() -> None:
    """Measure every contender, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        contender = dict(CONTENDERS[args.one])
        run = globals()[contender.pop("run")]
        (args.work / "metrics.json").write_text(json.dumps(run(args, **contender)))
        return
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in args.only}
    with tempfile.TemporaryDirectory() as work:
        args.work = Path(work)
        prepare(args)
        for _ in range(args.rounds):
            for name in args.only:
                rounds[name].append(measure(name, args))
                print(name, rounds[name][-1], flush=True)
    metrics = over_rounds(rounds)
    show(metrics)
    if args.json:
        record = {
            "date": date.today().isoformat(),
            "machine": machine(args),
            "command": " ".join(["python", *sys.argv]),
            "over_rounds": metrics,
            "rounds": rounds,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Measure one contender in a separate process."""
    log = args.work / "log"
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name, "--work", str(args.work)]
    with log.open("w") as stream:
        done = subprocess.run(command, stderr=stream, stdout=stream)
    if done.returncode:
        sys.exit(f"{name} failed:\n{log.read_text()[-3000:]}")
    return json.loads((args.work / "metrics.json").read_text())


def show(metrics: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print medians over the rounds, with their spread below."""
    for unit, suffix in (("second", ""), ("CPU second", "_per_cpu_second")):
        print(f"\ntokens per {unit:16} {'1 stream':>13} {'16 streams':>13}  ratio  peak MB")
        for name, contender in metrics.items():
            single = contender[f"streams_1{suffix}"]
            batched = contender[f"streams_16{suffix}"]
            print(
                f"{name:27} {single['median']:13,.0f} {batched['median']:13,.0f}"
                f" {batched['median'] / single['median']:6.1f}"
                f" {contender['peak_mb']['median']:8,.0f}\n"
                f"{'':27} {spread(single):>13} {spread(batched):>13}"
            )


def prepare(args: argparse.Namespace) -> None:
    """Write a model directory with a tokenizer, and the same weights as GGUF."""
    import torch

    from minimind.data.textbook import prose
    from minimind.export.gguf import export_gguf
    from minimind.model import PRESETS, ModelConfig, Transformer, save_model
    from minimind.tokenizer import train_tokenizer

    sentences = prose(1)
    tokenizer = train_tokenizer([next(sentences) for _ in range(20_000)])
    torch.manual_seed(0)
    shape = PRESETS[args.preset] | {"vocab_size": tokenizer.vocab_size}
    model = Transformer(ModelConfig(**shape))
    with torch.no_grad():  # with initial weights the same token would always be the argmax
        model.head_weight.mul_(5)
    save_model(args.work / "model", model, tokenizer)
    for kind in ("F16", "Q8_0"):
        export_gguf(args.work / "model", args.work / f"{kind}.gguf", type=kind.lower())


def prompts(args: argparse.Namespace, number: int) -> list[list[int]]:
    """Return random prompts."""
    import random

    rng = random.Random(number)
    return [[rng.randrange(1000, 6000) for _ in range(args.prompt)] for _ in range(number)]


def timed(open_generator, args: argparse.Namespace) -> dict[str, float]:
    """Measure tokens per second for each number of streams, and memory.

    open_generator: a context manager that allocates for a number of streams, outside the timed
    part, and yields `generate`: prompts -> number of generated tokens.
    """
    import psutil

    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], psutil.Process().memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with open_generator(1) as generate:
        generate(prompts(args, 1))
    done.set()
    watcher.join()
    metrics = {"peak_mb": max(peak[0], psutil.Process().memory_info().rss) / 2**20}
    for streams in STREAMS:
        seconds, cpu_seconds = [], []
        with open_generator(streams) as generate:
            generate(prompts(args, streams))  # warm-up
            for _ in range(3):
                started = time.perf_counter(), time.process_time()
                generated = generate(prompts(args, streams))
                seconds.append(time.perf_counter() - started[0])
                cpu_seconds.append(time.process_time() - started[1])
                assert generated == streams * args.tokens
        metrics[f"streams_{streams}"] = generated / statistics.median(seconds)
        metrics[f"streams_{streams}_per_cpu_second"] = generated / statistics.median(cpu_seconds)
    return metrics


def minimind(args: argparse.Namespace, dtype: str, int8: bool = False) -> dict[str, float]:
    """Measure minimind's engine."""
    import torch

    from minimind.inference.engine import Engine
    from minimind.inference.load import load_for_inference
    from minimind.inference.requests import Request
    from minimind.inference.sampling import Sampling

    torch.set_num_threads(args.threads)
    model, tokenizer = load_for_inference(args.work / "model", "cpu", dtype=getattr(torch, dtype))
    engine = Engine(model, tokenizer, slots=max(STREAMS), int8=int8)
    del model

    def generate(prompts: list[list[int]]) -> int:
        requests = [Request(prompt, Sampling(temperature=0), args.tokens) for prompt in prompts]
        return sum(len(result.token_ids) for _, result in engine.generate(requests))

    with engine:
        return timed(lambda streams: contextlib.nullcontext(generate), args)


def transformers(args: argparse.Namespace, dtype: str) -> dict[str, float]:
    """Measure `generate` of transformers; all prompts form one batch."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(
        args.work / "model", attn_implementation="sdpa", dtype=getattr(torch, dtype)
    ).eval()
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(prompts: list[list[int]]) -> int:
        ids = torch.tensor(prompts)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=args.tokens,
            max_new_tokens=args.tokens,
        )
        return output[:, ids.shape[1] :].numel()

    return timed(lambda streams: contextlib.nullcontext(generate), args)


def llama(args: argparse.Namespace, file: str) -> dict[str, float]:
    """Measure llama.cpp; all sequences form one batch."""
    import ctypes

    import llama_cpp as lib
    import numpy

    lib.llama_backend_init()
    quiet = lib.llama_log_callback(lambda *rest: None)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    path = str(args.work / f"{file}.gguf").encode()
    model = lib.llama_model_load_from_file(path, lib.llama_model_default_params())
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    @contextlib.contextmanager
    def open_generator(streams: int):
        settings = lib.llama_context_default_params()
        settings.n_ctx = streams * (args.prompt + args.tokens)
        settings.n_seq_max = streams
        settings.n_batch = settings.n_ctx
        settings.n_threads = settings.n_threads_batch = args.threads
        context = lib.llama_init_from_model(model, settings)
        batch = lib.llama_batch_init(settings.n_ctx, 0, 1)
        yield functools.partial(generate, context, batch)
        lib.llama_batch_free(batch)
        lib.llama_free(context)

    def step(context, batch, rows: list[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, with_logits) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = with_logits
        assert lib.llama_decode(context, batch) == 0

    def generate(context, batch, prompts: list[list[int]]) -> int:
        lib.llama_memory_clear(lib.llama_get_memory(context), False)  # like llama.cpp's server
        step(
            context,
            batch,
            [
                (token, position, sequence, position == args.prompt - 1)
                for sequence, prompt in enumerate(prompts)
                for position, token in enumerate(prompt)
            ],
        )
        logit_rows = [(s + 1) * args.prompt - 1 for s in range(len(prompts))]
        for done in range(args.tokens):
            tokens = []
            for row in logit_rows:
                logits = lib.llama_get_logits_ith(context, row)
                tokens.append(int(numpy.ctypeslib.as_array(logits, (vocab,)).argmax()))
            if done < args.tokens - 1:
                rows = [(t, args.prompt + done, s, True) for s, t in enumerate(tokens)]
                step(context, batch, rows)
                logit_rows = list(range(len(prompts)))
        return len(prompts) * args.tokens

    return timed(open_generator, args)


def machine(args: argparse.Namespace) -> str:
    """Describe the processor, cores and library versions."""
    import os
    from importlib.metadata import version

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        model = next((x.split(": ")[1] for x in lines if x.startswith("model name")), model)
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers", "llama-cpp-python")]
    return f"{os.cpu_count()} cores, {args.threads} used, {model}, " + ", ".join(versions)


if __name__ == "__main__":
    main()
