"""Decoding speed: 1, 16 and 128 streams, with and without CUDA graphs, against transformers."""

import random
import statistics
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

from benchmarks.gpu.context import Context


def run(context: Context) -> None:
    """Measure minimind's engine and `generate` of transformers on the same random weights."""
    import torch

    from minimind.data.textbook import prose
    from minimind.model import PRESETS, ModelConfig, Transformer, save_model
    from minimind.tokenizer import train_tokenizer

    presets = ("nano", "nano-moe") if context.tiny else ("small", "moe")
    streams = (1, 3) if context.tiny else (1, 16, 128)
    sentences, vocab = (1_000, 600) if context.tiny else (5_000, 6400)
    tokenizer = train_tokenizer(list(islice(prose(1), sentences)), vocab_size=vocab)
    for preset in presets:
        torch.manual_seed(0)
        shape = PRESETS[preset] | {"vocab_size": tokenizer.vocab_size}
        model = Transformer(ModelConfig(**shape))
        with torch.no_grad():  # with initial weights the same token would always be the argmax
            model.head_weight.mul_(5)
        save_model(context.work / f"model-{preset}", model, tokenizer)
    context.measure("agreement", lambda: agreement(context, context.work / f"model-{presets[0]}"))
    for preset in presets:
        folder = context.work / f"model-{preset}"
        for number in streams:
            for graphs in (True, False):
                name = f"{preset} {number} {'CUDA graphs' if graphs else 'eager'}"
                context.measure(
                    name, lambda n=number, g=graphs, f=folder: minimind(context, f, n, g)
                )
            name = f"{preset} {number} transformers"
            context.measure(name, lambda n=number, f=folder: transformers(context, f, n))


def sizes(context: Context) -> tuple[int, int]:
    """Return the numbers of prompt tokens and of new tokens."""
    return (8, 8) if context.tiny else (128, 128)


def prompts(context: Context, number: int, round_number: int) -> list[list[int]]:
    """Return random prompts, others in every round: the prefix cache would serve a repeated one."""
    rng, length = random.Random(f"{number} {round_number}"), sizes(context)[0]
    return [[rng.randrange(300, 500) for _ in range(length)] for _ in range(number)]


def timed_rounds(context: Context, generate: Any, number: int) -> dict[str, float]:
    """Return tokens per second, the median of three rounds after a warm-up, and their spread."""
    new_tokens = sizes(context)[1]
    generate(prompts(context, number, 0))
    rates = []
    for round_number in (1, 2, 3):
        batch = prompts(context, number, round_number)
        started = time.perf_counter()
        generated = generate(batch)
        rates.append(generated / (time.perf_counter() - started))
        assert generated == number * new_tokens, (generated, number)
    median = statistics.median(rates)
    return {"tokens_per_second": median, "min": min(rates), "max": max(rates)}


def minimind(context: Context, folder: Any, number: int, graphs: bool) -> dict[str, Any]:
    """Measure the engine; also the time to the first token of one prompt."""
    from minimind.inference.engine import Engine
    from minimind.inference.load import load_for_inference
    from minimind.inference.requests import Request
    from minimind.inference.sampling import Sampling

    model, tokenizer = load_for_inference(folder, context.device)
    with Engine(model, tokenizer, slots=number, context=sum(sizes(context)) + 8) as engine:
        engine._graphed_model._enabled &= graphs

        def generate(prompts: list[list[int]], tokens: int = sizes(context)[1]) -> int:
            requests = [Request(prompt, Sampling(temperature=0), tokens) for prompt in prompts]
            results = [result for _, result in engine.generate(requests)]
            for result in results:
                if result.error:
                    raise result.error
            return sum(len(result.token_ids) for result in results)

        metrics: dict[str, Any] = timed_rounds(context, generate, number)
        metrics["first_token_ms"] = first_token_ms(context, generate)
        metrics["uses_graphs"] = engine._graphed_model._enabled
        metrics["dtype"] = str(engine.model.dtype)
        metrics["invariance"] = engine.model.invariance_note
    return metrics


def first_token_ms(context: Context, generate: Callable[[list[list[int]], int], int]) -> float:
    """Return the median milliseconds of `generate` for one token after one of nine prompts."""
    seconds = []
    for round_number in range(4, 13):
        prompt = prompts(context, 1, round_number)
        started = time.perf_counter()
        generate(prompt, 1)
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def transformers(context: Context, folder: Any, number: int) -> dict[str, Any]:
    """Measure `generate` of transformers; all prompts form one batch."""
    import torch
    from transformers import AutoModelForCausalLM

    from minimind.inference.load import inference_dtype

    dtype = inference_dtype(torch.device(context.device))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=dtype)
    model = model.to(context.device).eval()
    model.generation_config.eos_token_id = None
    new_tokens = sizes(context)[1]

    @torch.inference_mode()
    def generate(prompts: list[list[int]], tokens: int = new_tokens) -> int:
        ids = torch.tensor(prompts, device=context.device)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
        )
        return output[:, ids.shape[1] :].numel()

    metrics = timed_rounds(context, generate, number)
    return metrics | {"first_token_ms": first_token_ms(context, generate)}


def agreement(context: Context, folder: Any) -> dict[str, Any]:
    """Compare greedy answers in float32 with those of the CPU, and of one stream with many."""
    import torch

    from minimind.inference.engine import Engine
    from minimind.inference.load import load_for_inference
    from minimind.inference.requests import Request
    from minimind.inference.sampling import Sampling

    def answers(device: str, dtype: torch.dtype | None, together: bool) -> list[Any]:
        model, tokenizer = load_for_inference(folder, device, dtype=dtype)
        texts: dict[int, Any] = {}
        with Engine(model, tokenizer, slots=8, context=sum(sizes(context)) + 8) as engine:
            requests = [
                Request(prompt, Sampling(temperature=0), sizes(context)[1])
                for prompt in prompts(context, 8, 0)
            ]
            groups = [requests] if together else [[request] for request in requests]
            for offset, group in enumerate(groups):
                for index, result in engine.generate(group):
                    texts[index if together else offset] = result.token_ids
        return [texts[index] for index in sorted(texts)]

    on_cpu = answers("cpu", torch.float32, True)
    on_device = answers(context.device, torch.float32, True)
    half, alone = answers(context.device, None, True), answers(context.device, None, False)
    return {
        "of 8 answers, equal to the CPU in float32": sum(map(tuple.__eq__, on_cpu, on_device)),
        "of 8 answers, equal alone and in a batch": sum(map(tuple.__eq__, half, alone)),
    }
