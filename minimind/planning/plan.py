"""Estimate the memory, the steps and the time of a stage before it runs."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from minimind.config.settings import Recipe
from minimind.data.estimate import estimate_tokens
from minimind.data.store import default_folder
from minimind.data.textbook import textbook_file
from minimind.errors import DataError, ResourceError
from minimind.model import Transformer
from minimind.model.device import choose_device, free_bytes
from minimind.paths import expand_user
from minimind.tokenizer import Tokenizer
from minimind.training.batch import TensorBatch
from minimind.training.build import (
    build_footprint,
    build_model,
    check_backend_installed,
    load_tokenizer,
)
from minimind.training.datasets import KINDS
from minimind.training.memory import Footprint, divisors
from minimind.training.objectives.next_token import NextToken
from minimind.training.optimizers import Optimizers
from minimind.training.precision import assumed_precision, choose_precision

# Memory of a process besides tensors: PyTorch itself, and on a GPU the CUDA context and libraries.
PROCESS_BYTES = {"cpu": 400 << 20, "cuda": 450 << 20, "mps": 400 << 20}
_MAX_LISTED_MICRO_BATCH = 64


@dataclass(frozen=True)
class Plan:
    """The estimated cost of a stage, in bytes and seconds. Unknown values are None."""

    parameters: int
    active_parameters: int
    trained_parameters: int
    device: str
    device_is_present: bool  # False if this machine lacks it; the precision is assumed then
    precision: str
    seq_len: int
    global_batch_size: int
    micro_batch_size: int | None  # the requested or the largest fitting one; None if none fits
    activation_checkpointing: bool
    memory: dict[str, int]  # by component, at that micro-batch size
    memory_limit: int | None
    choices: list[dict[str, int | bool]]  # [{micro_batch_size, activation_checkpointing, bytes}]
    data_tokens: int | None  # per epoch
    steps: int | None
    tokens: int | None  # in all steps
    flops_per_token: int
    tokens_per_second: float | None  # measured in a short trial
    seconds: float | None  # of the run, at that rate

    def metrics(self) -> dict[str, Any]:
        """Return the plan as a dictionary that can be written as JSON."""
        return vars(self) | {"memory_total": sum(self.memory.values())}


def make_plan(recipe: Recipe, *, memory: int | None = None, seconds: float = 10.0) -> Plan:
    """Estimate the cost of the stage of `recipe`.

    memory: bytes to plan for; None means the free memory of the device. If memory is given, this
    machine may lack the device; the speed is not measured then.
    seconds: duration of the trial that measures the speed; 0 means no trial.
    Raises ResourceError for a missing device, and the errors of loading the tokenizer, the model
    and the data.
    """
    check_backend_installed(recipe)
    device, is_present = _resolve_device(recipe.device, allow_missing=memory is not None)
    if is_present:
        precision = choose_precision(recipe.training.precision, device).name
    else:
        precision = assumed_precision(recipe.training.precision, device.type)
    free = free_bytes(device) if is_present else None  # before the model is loaded
    tokenizer = load_tokenizer(recipe)
    measures = bool(seconds) and is_present
    if recipe.model.init:  # its files are checked, too
        model = build_model(recipe, tokenizer, device if measures else torch.device("cpu"))
    else:
        with torch.device("meta") as meta:  # shapes suffice
            model = build_model(recipe, tokenizer, meta)
    footprint, training = build_footprint(recipe, model, device), recipe.training
    process_bytes = PROCESS_BYTES[device.type]
    limit = memory
    if memory is None and free is not None:
        limit = free + process_bytes  # this process has already taken its own
    fitting = footprint.largest_micro_batch(
        training.global_batch_size, None if limit is None else limit - process_bytes
    )
    micro_batch = training.micro_batch_size or fitting
    data_tokens = _estimate_data_tokens(recipe, tokenizer)
    steps = training.steps
    if steps is None and data_tokens is not None:
        sequences = training.epochs * data_tokens / recipe.data.seq_len
        steps = max(1, math.ceil(sequences / training.global_batch_size))
    tokens = steps * training.global_batch_size * recipe.data.seq_len if steps else None
    tokens_per_second = None
    fits_here = micro_batch and (free is None or footprint.total(micro_batch) <= free)
    if measures and micro_batch and fits_here:
        if not recipe.model.init:
            model = build_model(recipe, tokenizer, device)
        tokens_per_second = measure_throughput(recipe, model, device, micro_batch, seconds)
    return Plan(
        parameters=footprint.parameters,
        active_parameters=model.num_active_parameters,
        trained_parameters=footprint.trained_parameters,
        device=str(device),
        device_is_present=is_present,
        precision=precision,
        seq_len=recipe.data.seq_len,
        global_batch_size=training.global_batch_size,
        micro_batch_size=micro_batch,
        activation_checkpointing=training.activation_checkpointing,
        memory={"process": process_bytes} | footprint.components(micro_batch or 1),
        memory_limit=limit,
        choices=_estimate_choices(footprint, training.global_batch_size, process_bytes),
        data_tokens=data_tokens,
        steps=steps,
        tokens=tokens,
        flops_per_token=flops_per_token(
            model, recipe.data.seq_len, training.activation_checkpointing
        ),
        tokens_per_second=tokens_per_second,
        seconds=recipe.weighted_tokens(tokens) / tokens_per_second
        if tokens and tokens_per_second
        else None,
    )


def _estimate_choices(
    footprint: Footprint, global_batch_size: int, process_bytes: int
) -> list[dict[str, int | bool]]:
    """Estimate the memory of some micro-batch sizes, with and without activation checkpointing.

    The sizes are divisors of the global batch size, each at least twice the one before.
    """
    sizes: list[int] = []
    for size in reversed(divisors(global_batch_size)):
        if size <= _MAX_LISTED_MICRO_BATCH and (not sizes or size >= 2 * sizes[-1]):
            sizes.append(size)
    return [
        {
            "micro_batch_size": size,
            "activation_checkpointing": recompute,
            "bytes": process_bytes
            + replace(footprint, activation_checkpointing=recompute).total(size),
        }
        for size in sizes
        for recompute in (False, True)
    ]


def _resolve_device(name: str, *, allow_missing: bool) -> tuple[torch.device, bool]:
    """Return (device, True if this machine has it).

    Raises ResourceError for an unknown device, and for a missing one unless `allow_missing`.
    """
    try:
        return choose_device(name), True
    except ResourceError:
        if allow_missing and name.partition(":")[0] in PROCESS_BYTES:
            with contextlib.suppress(RuntimeError):  # "cuda:one"
                return torch.device(name), False
        raise


def flops_per_token(
    model: Transformer, seq_len: int, activation_checkpointing: bool = False
) -> int:
    """Count the floating-point operations of training on one token (Kaplan et al. 2020, sec. 2.1).

    A forward pass takes 2 per active weight, plus those of the attention products with keys and
    values; with a causal mask, a token attends to half the sequence on average. The backward pass
    takes twice as many, and activation checkpointing adds a second forward pass.
    """
    # --8<-- [start:flops]
    config = model.config
    weights = model.num_active_parameters
    if not config.tie_word_embeddings:  # the input embedding is a lookup, not a product
        weights -= config.vocab_size * config.hidden_size
    attention = (
        2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
    )
    forward = 2 * weights + attention
    return forward * (4 if activation_checkpointing else 3)
    # --8<-- [end:flops]


def _estimate_data_tokens(recipe: Recipe, tokenizer: Tokenizer | None) -> int | None:
    """Estimate the tokens per epoch; None if data or tokenizer are not set."""
    data = recipe.data
    if not data.sources or tokenizer is None:
        return None
    folder = expand_user(data.store) if data.store else default_folder()
    counts = [
        source.weight
        * estimate_tokens(
            textbook_file(source.path, folder, data.variables),
            tokenizer,
            kind=KINDS[recipe.objective],
            schema=source.record_schema,
            variables=data.variables,
            seq_len=data.seq_len,
        )
        for source in data.sources
    ]
    if not sum(counts):
        raise DataError(
            f"{', '.join(source.path for source in data.sources)}: there is nothing to train on; "
            "`minimind data inspect` shows what the files contain"
        )
    return round(sum(counts) * (1 if data.validation else 1 - data.validation_fraction))


def measure_throughput(
    recipe: Recipe, model: Transformer, device: torch.device, micro_batch: int, seconds: float
) -> float:
    """Measure the tokens per second of training steps on random tokens.

    The time of a step is the median time of a micro-batch, times their number, plus the time of the
    optimizers.
    """
    config, seq_len, batch = model.config, recipe.data.seq_len, recipe.training.global_batch_size
    precision = choose_precision(recipe.training.precision, device)
    optimizers = Optimizers(model, recipe.optim)
    objective = NextToken([1] * config.vocab_size, device)
    tokens = torch.randint(config.vocab_size, (micro_batch, seq_len), device=device)
    sequences = TensorBatch(tokens, tokens, None, torch.arange(tokens.numel(), device=device))

    def forward_backward() -> None:
        with precision.autocast():
            output = objective.loss(model, sequences)
        (output.loss_sum / output.count).backward()

    model.train()
    timed(forward_backward, device)  # warmup
    timed(optimizers.step, device)
    durations = [timed(forward_backward, device)]
    optimizer_s = timed(optimizers.step, device)
    while sum(durations) < seconds:
        durations.append(timed(forward_backward, device))
    optimizers.zero_grad()
    return batch * seq_len / (batch / micro_batch * float(median(durations)) + optimizer_s)


def timed(work: Callable[[], None], device: torch.device) -> float:
    """Return the seconds that `work` takes, including device synchronization."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - started
