"""Measure training and decoding on this machine, and compare it with recorded machines.

Each measurement runs in a new process, so that its peak memory and its thread pools are its own.
"""

import json
import os
import platform
import random
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from importlib import resources
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch

from minimind.config import load_recipe
from minimind.config.settings import Recipe
from minimind.data.textbook import prose
from minimind.environment import python_module
from minimind.errors import MinimindError, ResourceError, is_out_of_memory
from minimind.inference.engine import Engine
from minimind.inference.load import inference_dtype, single_threaded
from minimind.inference.requests import Request
from minimind.inference.sampling import Sampling
from minimind.model import PRESETS, Transformer
from minimind.model.device import choose_device, free_bytes
from minimind.planning.attainable import attainable_flops
from minimind.planning.plan import flops_per_token, measure_throughput
from minimind.signals import exit_when_stdin_closes
from minimind.tokenizer import train_tokenizer
from minimind.training.build import build_footprint
from minimind.training.memory import choose_micro_batch, peak_bytes
from minimind.training.precision import choose_precision

STREAMS = (1, 16)
_RECIPES = {"demo": "demo-pretrain", "base": "pretrain-base", "moe": "pretrain-moe"}
_VOCAB_SIZE, _DEMO_VOCAB_SIZE = 6400, 3200
_PROMPT_TOKENS, _NEW_TOKENS = 32, 128
_PASS_S = 1.0  # of the fastest matrix products: real passes take two to five times as long
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def measure_machine(
    preset: str, device: str, seconds: float, progress: Callable[[int, int, str], None]
) -> dict[str, Any]:
    """Measure training and decoding of a preset; `seconds` is the duration of each measurement.

    progress: called with the finished measurements, their number, and the name of the next.
    A measurement that does not fit into memory gives {"error": message}. Raises ResourceError for
    a missing device, or if a process of a measurement is killed.
    """
    chosen = choose_device(device)
    formats = [_NAMES[inference_dtype(chosen)], *(["int8"] if chosen.type == "cpu" else [])]
    tasks: dict[str, tuple[str, *tuple[object, ...]]] = {
        f"decoding, {name}": ("decoding_speed", preset, device, seconds, name == "int8")
        for name in formats
    }
    tasks["training"] = ("training_speed", preset, device, seconds)
    results: dict[str, Any] = {}
    for done, (name, task) in enumerate(tasks.items()):
        progress(done, len(tasks), name)
        results[name] = _in_process(*task)
    progress(len(tasks), len(tasks), "")
    return {
        "preset": preset,
        "device": str(chosen),
        "training": results["training"],
        "decoding": {name: results[f"decoding, {name}"] for name in formats},
    }


def training_speed(preset: str, device: str, seconds: float) -> dict[str, Any]:
    """Measure training steps of a preset on random tokens, and the attainable FLOPs around them."""
    chosen = choose_device(device)
    recipe, precision = bench_recipe(preset, device), choose_precision("auto", chosen)
    dtype = _DTYPES[precision.name]
    before = attainable_flops(chosen, dtype, seconds / 10)
    free = free_bytes(chosen)
    model = Transformer(recipe.model.shape(vocab_size(preset))).to(chosen)
    flops, batch = flops_per_token(model, recipe.data.seq_len), recipe.training.global_batch_size
    fitting = choose_micro_batch(
        build_footprint(recipe, model, chosen),
        requested=None,
        num_sequences=batch,
        device=chosen,
        free=free,
    )
    wanted = max(1, int(_PASS_S * before / flops / recipe.data.seq_len))
    micro_batch = max(n for n in range(1, fitting + 1) if batch % n == 0 and n <= max(1, wanted))
    return {
        "precision": precision.name,
        "seq_len": recipe.data.seq_len,
        "micro_batch_size": micro_batch,
        **measure_utilisation(recipe, model, chosen, micro_batch, dtype, seconds, before),
        "peak_memory_bytes": peak_bytes(chosen),
    }


def measure_utilisation(
    recipe: Recipe,
    model: Transformer,
    device: torch.device,
    micro_batch: int,
    dtype: torch.dtype,
    seconds: float,
    attainable_before: float,
) -> dict[str, float]:
    """Measure training steps for `seconds`, then the attainable FLOPs in `dtype` again.

    attainable_before: the attainable FLOPs per second, measured just before: on a shared host they
    change within minutes.
    """
    flops = flops_per_token(model, recipe.data.seq_len)
    rate = measure_throughput(recipe, model, device, micro_batch, seconds)
    attainable = median([attainable_before, attainable_flops(device, dtype, seconds / 10)])
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_token": flops,
        "tokens_per_second": rate,
        "attainable_flops": attainable,
        "utilisation": rate * flops / attainable,
    }


def vocab_size(preset: str) -> int:
    """Return the vocabulary size of the recipes of a preset."""
    return _DEMO_VOCAB_SIZE if preset.startswith("demo") else _VOCAB_SIZE


def training_flops_per_token(preset: str) -> int:
    """Return the FLOPs of training on one token with the recipe of a preset."""
    recipe = bench_recipe(preset, "cpu")
    with torch.device("meta"):
        model = Transformer(recipe.model.shape(vocab_size(preset)))
    return flops_per_token(model, recipe.data.seq_len)


def bench_recipe(preset: str, device: str) -> Recipe:
    """Return the pretraining recipe of a preset, without data."""
    flags: dict[str, Any] = {"model.preset": preset, "device": device}
    if (context := int(PRESETS[preset]["max_position_embeddings"])) < 512:
        flags["data.seq_len"] = context
    return load_recipe(_RECIPES.get(preset, "pretrain-small"), flags=flags).recipe


def decoding_speed(preset: str, device: str, seconds: float, int8: bool) -> dict[str, Any]:
    """Measure greedy decoding: 128 tokens after a prompt of 32, with 1 and with 16 streams.

    The time includes prefill. The weights are random.
    """
    chosen = choose_device(device)
    # A tokenizer of fewer tokens than the model has: it decodes equally fast.
    tokenizer = train_tokenizer(islice(prose(1), 2_000), vocab_size=600)
    config = bench_recipe(preset, device).model.shape(vocab_size(preset))
    with single_threaded():
        model = Transformer(config).to(chosen, inference_dtype(chosen)).eval()
    context = min(_PROMPT_TOKENS + _NEW_TOKENS, config.max_position_embeddings)
    result: dict[str, Any] = {}
    with Engine(model, tokenizer, slots=max(STREAMS), context=context, int8=int8) as engine:
        del model
        for streams in STREAMS:
            _generate(engine, streams, 8)  # warmup
            rates: list[float] = []
            started = time.perf_counter()
            while not rates or time.perf_counter() - started < seconds / 2:
                rates.append(_generate(engine, streams, _NEW_TOKENS))
            result[f"streams_{streams}"] = median(rates)
    return result | {"peak_memory_bytes": peak_bytes(chosen)}


def _generate(engine: Engine, streams: int, tokens: int) -> float:
    """Generate for different prompts at the same time; return tokens per second."""
    prompts = [random.choices(range(300, 500), k=_PROMPT_TOKENS) for _ in range(streams)]
    requests = [Request(prompt, Sampling(temperature=0), tokens) for prompt in prompts]
    started, generated = time.perf_counter(), 0
    for _, result in engine.generate(requests):
        if result.error:
            raise result.error
        generated += len(result.token_ids)
    return generated / (time.perf_counter() - started)


def _in_process(name: str, *arguments: object) -> dict[str, Any]:
    """Return the result of a function of this module in a new process, which ends with the caller.

    An error of minimind or of memory becomes {"error": message}. Raises ResourceError if the
    process is killed, as Linux does when memory runs out.
    """
    command = [*python_module(__name__), json.dumps([name, *arguments])]
    # In a new session, Ctrl-C interrupts only this process. The other ends when its stdin closes.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as child:
        assert child.stdout
        try:
            output = child.stdout.read()
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        raise ResourceError(
            f"{name}: the process ended with status {child.returncode}; it may have run out of "
            "memory. Close other programs, or choose a smaller preset"
        )
    result: dict[str, Any] = json.loads(output)
    return result


def _answer(name: str, *arguments: Any) -> None:
    """Print the result of a measurement as JSON."""
    measure: Callable[..., dict[str, Any]] = globals()[name]
    try:
        result = measure(*arguments)
    except (MinimindError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        result = {"error": str(error) or "out of memory"}
    print(json.dumps(result))


def describe_machine(device: str) -> dict[str, Any]:
    """Return processor, GPU, threads, torch version, and the load of the last minute if known."""
    chosen = choose_device(device)
    cpuinfo, names = Path("/proc/cpuinfo"), []
    if cpuinfo.is_file():
        lines = cpuinfo.read_text("utf-8").splitlines()
        names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    gpu = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else None
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "gpu": gpu or ("Apple GPU" if chosen.type == "mps" else None),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def recorded_machines(preset: str) -> list[dict[str, Any]]:
    """Return the recorded measurements of a preset; `machines.toml` has their source."""
    text = resources.files("minimind.planning").joinpath("machines.toml").read_text("utf-8")
    machines: list[dict[str, Any]] = tomllib.loads(text)["machine"]
    return [
        machine | {"date": machine["date"].isoformat()}
        for machine in machines
        if machine["preset"] == preset
    ]


if __name__ == "__main__":
    exit_when_stdin_closes()
    _answer(*json.loads(sys.argv[1]))
