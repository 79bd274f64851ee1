"""Decoding speed and memory of minimind, another checkout of it, transformers and llama.cpp.

    pip install -c constraints.txt -e '.[bench,llama-cpp]'
    python -m benchmarks.decoding_speed [--preset small] [--checkout DIR] [--json FILE] [--quick]

All use the same random weights, greedy decoding and no stop tokens. One stream: `--tokens` new
tokens after a prompt of `--prompt` tokens. 16 streams: the same with 16 different prompts in one
batch; llama.cpp is called through its C interface, like its server. The time includes prefill, but
not loading a model or allocating its KV cache. Prefill: prompt tokens per second of 8 prompts of
`--long` tokens with one new token each.

A measurement is the median of three repetitions. Tokens per CPU second, summed over cores, are
recorded too, because other work on the machine affects them far less. Memory is the peak of the
process up to its first completion.
"""

import argparse
import contextlib
import functools
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
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

# (prompts, new tokens) -> number of generated tokens
Generate = Callable[[list[list[int]], int], int]
# Allocates for a number of streams of a number of tokens, outside the timed part.
OpenGenerator = Callable[[int, int], AbstractContextManager[Generate]]

CONTENDERS: dict[str, dict[str, Any]] = {
    "minimind bf16": dict(run="minimind", dtype="bfloat16"),
    "minimind int8": dict(run="minimind", dtype="bfloat16", int8=True),
    "minimind fp32": dict(run="minimind", dtype="float32"),
    "checkout bf16": dict(run="minimind", dtype="bfloat16"),
    "checkout int8": dict(run="minimind", dtype="bfloat16", int8=True),
    "transformers fp32": dict(run="transformers", dtype="float32"),
    "transformers bf16": dict(run="transformers", dtype="bfloat16"),
    "llama.cpp F16": dict(run="llama", file="F16"),
    "llama.cpp Q8_0": dict(run="llama", file="Q8_0"),
    "llama.cpp Q8_0, not repacked": dict(run="llama", file="Q8_0", repack=False),
}
STREAMS = (1, 16)
_LONG_PROMPTS = 8
_COLUMNS = {
    "streams_1": ("1 stream", 0),
    "streams_16": ("16 streams", 0),
    "prefill": ("prefill", 0),
    "streams_1_per_cpu_second": ("1 stream, per CPU second", 0),
    "streams_16_per_cpu_second": ("16 streams, per CPU second", 0),
    "peak_mb": ("peak MB", 0),
}


def main() -> None:
    """Measure every contender, print a table, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--long", type=int, default=256)
    parser.add_argument("--checkout", type=Path, help="folder of another checkout of minimind")
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    args = parser.parse_args()
    if args.quick:
        args.preset, args.tokens, args.long, args.rounds = "nano", 8, 32, 1
    if args.contender:
        contender = dict(CONTENDERS[args.contender])
        globals()[contender.pop("run")](args, **contender)
        return
    packages = ["transformers"] + ["llama-cpp-python"] * any("llama" in x for x in args.only)
    with tempfile.TemporaryDirectory() as work, recording(args, *packages) as record:
        args.work = Path(work)
        prepare(args)
        rounds = measure_in_turns(contenders(args), args.rounds, args.threads, args.work)
        record |= {"over_rounds": over_rounds(rounds), "rounds": rounds}
        record["markdown"] = []
        for streams in STREAMS:
            table = comparison(
                rounds, _COLUMNS, metric=f"streams_{streams}", reference=next(iter(rounds))
            )
            record["markdown"] += [
                f"Tokens per second; ratios for streams: {streams}",
                "",
                *table,
                "",
            ]


def contenders(args: argparse.Namespace) -> list[Contender]:
    """Return the selected contenders."""
    names = [name for name in args.only if args.checkout or not name.startswith("checkout")]
    return [
        this_script(args, name, args.checkout.resolve() if name.startswith("checkout") else None)
        for name in names
    ]


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


def prompts(number: int, length: int) -> list[list[int]]:
    """Return random prompts."""
    rng = random.Random(number)
    return [[rng.randrange(300, 600) for _ in range(length)] for _ in range(number)]


def answer(open_generator: OpenGenerator, args: argparse.Namespace) -> None:
    """Measure on request."""
    with open_generator(1, args.prompt + args.tokens) as generate:
        peak = _peak_mb(lambda: generate(prompts(1, args.prompt), args.tokens))

    def measure() -> dict[str, float]:
        metrics = {"peak_mb": peak}
        for streams in STREAMS:
            rate, cpu_rate = _rates(open_generator, streams, args.prompt, args.tokens)
            metrics[f"streams_{streams}"] = rate
            metrics[f"streams_{streams}_per_cpu_second"] = cpu_rate
        rate, _ = _rates(open_generator, _LONG_PROMPTS, args.long, 1)
        return metrics | {"prefill": rate * args.long}

    answer_requests(measure)


def _rates(
    open_generator: OpenGenerator, streams: int, prompt: int, tokens: int
) -> tuple[float, float]:
    """Return new tokens per second and per CPU second, medians of three repetitions."""
    seconds, cpu_seconds = [], []
    with open_generator(streams, prompt + tokens) as generate:
        generate(prompts(streams, prompt), tokens)  # warm-up
        for _ in range(3):
            started = time.perf_counter(), time.process_time()
            generated = generate(prompts(streams, prompt), tokens)
            seconds.append(time.perf_counter() - started[0])
            cpu_seconds.append(time.process_time() - started[1])
            assert generated == streams * tokens
    return generated / statistics.median(seconds), generated / statistics.median(cpu_seconds)


def _peak_mb(work: Callable[[], object]) -> float:
    """Return the peak resident memory of the process during `work`, in MB."""
    import psutil

    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], psutil.Process().memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return float(max(peak[0], psutil.Process().memory_info().rss)) / 2**20


def minimind(args: argparse.Namespace, dtype: str, int8: bool = False) -> None:
    """Measure minimind's engine, or that of another checkout."""
    use_checkout(args.checkout if args.contender.startswith("checkout") else None)
    import torch

    from minimind.inference.engine import Engine, Request  # older ones define Request here
    from minimind.inference.load import load_for_inference
    from minimind.inference.sampling import Sampling

    model, tokenizer = load_for_inference(args.work / "model", "cpu", dtype=getattr(torch, dtype))
    engine = Engine(model, tokenizer, slots=max(STREAMS), int8=int8)
    del model
    # Random prompts repeat between calls, but a prefix cache must not make prefill look faster.
    count = iter(range(1 << 30))

    def generate(prompts: list[list[int]], tokens: int) -> int:
        first, generated, ended = 300 + next(count) % 300, [], threading.Semaphore(0)

        def collect(piece: Any) -> None:
            generated.extend(piece.token_ids)
            if piece.finish_reason:
                ended.release()

        for prompt in prompts:
            request = Request([first, *prompt[1:]], Sampling(temperature=0), tokens)
            engine.submit(request, collect)
        for _ in prompts:
            ended.acquire()
        return len(generated)

    with engine:
        answer(lambda streams, tokens: contextlib.nullcontext(generate), args)


def transformers(args: argparse.Namespace, dtype: str) -> None:
    """Measure `generate` of transformers; all prompts form one batch."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        args.work / "model", attn_implementation="sdpa", dtype=getattr(torch, dtype)
    ).eval()
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(prompts: list[list[int]], tokens: int) -> int:
        ids = torch.tensor(prompts)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
        )
        return output[:, ids.shape[1] :].numel()

    answer(lambda streams, tokens: contextlib.nullcontext(generate), args)


def llama(args: argparse.Namespace, file: str, repack: bool = True) -> None:
    """Measure llama.cpp; all sequences form one batch.

    repack: allow layouts of the weights for the processor's instructions. With AMX it fails in
        virtual machines that report AMX but do not grant it.
    """
    import ctypes

    import llama_cpp as lib
    import numpy

    lib.llama_backend_init()
    quiet = lib.llama_log_callback(lambda *rest: None)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    path = str(args.work / f"{file}.gguf").encode()
    options = lib.llama_model_default_params()
    options.use_extra_bufts = repack
    model = lib.llama_model_load_from_file(path, options)
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    @contextlib.contextmanager
    def open_generator(streams: int, tokens: int) -> Iterator[Generate]:
        settings = lib.llama_context_default_params()
        settings.n_ctx = streams * tokens
        settings.n_seq_max = streams
        settings.n_batch = settings.n_ctx
        settings.n_threads = settings.n_threads_batch = args.threads
        context = lib.llama_init_from_model(model, settings)
        batch = lib.llama_batch_init(settings.n_ctx, 0, 1)
        yield functools.partial(generate, context, batch)
        lib.llama_batch_free(batch)
        lib.llama_free(context)

    def step(context: Any, batch: Any, rows: list[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, with_logits) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = with_logits
        assert lib.llama_decode(context, batch) == 0

    def generate(context: Any, batch: Any, prompts: list[list[int]], tokens: int) -> int:
        length = len(prompts[0])
        lib.llama_memory_clear(lib.llama_get_memory(context), False)  # like llama.cpp's server
        step(
            context,
            batch,
            [
                (token, position, sequence, position == length - 1)
                for sequence, prompt in enumerate(prompts)
                for position, token in enumerate(prompt)
            ],
        )
        logit_rows = [(s + 1) * length - 1 for s in range(len(prompts))]
        for done in range(tokens):
            chosen = []
            for row in logit_rows:
                logits = lib.llama_get_logits_ith(context, row)
                chosen.append(int(numpy.ctypeslib.as_array(logits, (vocab,)).argmax()))
            if done < tokens - 1:
                rows = [(t, length + done, s, True) for s, t in enumerate(chosen)]
                step(context, batch, rows)
                logit_rows = list(range(len(prompts)))
        return len(prompts) * tokens

    answer(open_generator, args)


if __name__ == "__main__":
    main()
