"""What a stage will take, before anything of it is done."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
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
from minimind.tokenizer import Tokenizer
from minimind.training.batch import TensorBatch
from minimind.training.build import KINDS, build_model, footprint, load_tokenizer
from minimind.training.memory import divisors
from minimind.training.objectives.next_token import NextToken
from minimind.training.optimizers import Optimizers
from minimind.training.precision import choose_precision

# What a process takes beside tensors: torch itself, and on a GPU its context and libraries.
_PROCESS = {"cpu": 400 << 20, "cuda": 450 << 20, "mps": 400 << 20}


@dataclass(frozen=True)
class Plan:
    """bytes are bytes, seconds seconds; None where nobody can know.

    memory: by part, with `micro_batch` windows at once. tokens: what is seen in the whole run.
    measured: tokens a second of a short trial, and the time of the run at that rate.
    """

    parameters: int
    active_parameters: int
    trained_parameters: int
    device: str
    precision: str
    seq_len: int
    batch: int
    micro_batch: int | None
    activation_checkpointing: bool
    memory: dict[str, int]
    memory_given: int | None
    choices: list[dict[str, int | bool]]  # {"micro_batch", "activation_checkpointing", "bytes"}
    data_tokens: int | None
    steps: int | None
    tokens: int | None
    flops_a_token: int
    tokens_per_second: float | None
    seconds: float | None

    def metrics(self) -> dict[str, Any]:
        """As JSON."""
        return vars(self) | {"memory_total": sum(self.memory.values())}


def make_plan(recipe: Recipe, *, memory: int | None = None, seconds: float = 10.0) -> Plan:
    """Plan the stage of `recipe`: the micro-batch that fits into `memory` bytes (None = what is
    free on the device), and the time from a trial of about so many seconds (0 = no trial).

    With `memory` given the device may be one that another machine has; then there is no trial.
    Raises what loading the tokenizer, the model and the data raises.
    """
    device, is_here = _device(recipe.device, elsewhere=memory is not None)
    precision = choose_precision(recipe.training.precision, device).name if is_here else "?"
    free = free_bytes(device) if is_here else None  # beside this process, before the model is there
    tokenizer = load_tokenizer(recipe)
    model = build_model(recipe, tokenizer, device if is_here else torch.device("cpu"))
    asked, training = footprint(recipe, model, device), recipe.training
    given = memory
    if memory is None and free is not None:
        given = free + _PROCESS[device.type]
    room = None if given is None else given - _PROCESS[device.type]
    fitting = asked.fitting(training.global_batch_size, room)
    micro_batch = training.micro_batch_size or fitting
    data_tokens = _data_tokens(recipe, tokenizer)
    steps = training.steps
    if steps is None and data_tokens is not None:
        sequences = training.epochs * data_tokens / recipe.data.seq_len
        steps = max(1, math.ceil(sequences / training.global_batch_size))
    tokens = steps * training.global_batch_size * recipe.data.seq_len if steps else None
    rate = None
    fits_here = micro_batch and (free is None or asked.total(micro_batch) <= free)
    if seconds and is_here and micro_batch and fits_here:
        rate = _rate(recipe, model, device, micro_batch, seconds)
    parts = asked.parts(micro_batch or 1)
    return Plan(
        parameters=asked.parameters,
        active_parameters=model.num_active_parameters,
        trained_parameters=asked.trained_parameters,
        device=str(device),
        precision=precision,
        seq_len=recipe.data.seq_len,
        batch=training.global_batch_size,
        micro_batch=micro_batch,
        activation_checkpointing=training.activation_checkpointing,
        memory={"process": _PROCESS[device.type]} | parts,
        memory_given=given,
        choices=[
            {
                "micro_batch": sequences,
                "activation_checkpointing": again,
                "bytes": _PROCESS[device.type]
                + replace(asked, activation_checkpointing=again).total(sequences),
            }
            for sequences in _round_numbers(training.global_batch_size)
            for again in (False, True)
        ],
        data_tokens=data_tokens,
        steps=steps,
        tokens=tokens,
        flops_a_token=flops_a_token(model, recipe.data.seq_len, training.activation_checkpointing),
        tokens_per_second=rate,
        seconds=tokens / rate if tokens and rate else None,
    )


def _round_numbers(batch: int) -> list[int]:
    """Micro-batches to show: divisors of the batch, each at least twice the one before, to 64."""
    shown: list[int] = []
    for number in reversed(divisors(batch)):
        if number <= 64 and (not shown or number >= 2 * shown[-1]):
            shown.append(number)
    return shown


def _device(name: str, *, elsewhere: bool) -> tuple[torch.device, bool]:
    """The device, and whether this machine has it. Raises ResourceError where it must have it."""
    try:
        return choose_device(name), True
    except ResourceError:
        if not elsewhere or name.partition(":")[0] not in _PROCESS:
            raise
        return torch.device(name), False


def flops_a_token(model: Transformer, seq_len: int, activation_checkpointing: bool = False) -> int:
    """Floating-point operations of training on one token (Kaplan et al. 2020, section 2.1).

    Two for each weight at work forwards, four backwards; of attention the products with keys and
    values, causal, so half a window on average.
    """
    config = model.config
    weights = model.num_active_parameters
    if not config.tie_word_embeddings:  # a table that is looked up multiplies nothing
        weights -= config.vocab_size * config.hidden_size
    attention = (
        2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
    )
    forward = 2 * weights + attention
    return forward * (4 if activation_checkpointing else 3)


def _data_tokens(recipe: Recipe, tokenizer: Tokenizer | None) -> int | None:
    """About how many tokens an epoch sees; None when data or tokenizer are not told yet."""
    data = recipe.data
    if not data.sources or tokenizer is None:
        return None
    folder = Path(data.store) if data.store else default_folder()
    counts = [
        source.weight
        * estimate_tokens(
            textbook_file(source.path, folder, data.variables),
            tokenizer,
            kind=KINDS[recipe.objective],
            schema=source.record_schema,
            fill=data.variables,
        )
        for source in data.sources
    ]
    if not sum(counts):
        raise DataError(
            f"{', '.join(source.path for source in data.sources)}: there is nothing to train on; "
            "`minimind data inspect` shows what the files hold"
        )
    return round(sum(counts) * (1 if data.validation else 1 - data.validation_fraction))


def _rate(
    recipe: Recipe, model: Transformer, device: torch.device, micro_batch: int, seconds: float
) -> float:
    """Tokens a second of steps on random tokens: some micro-batches, and the optimizer's part."""
    config, seq_len, batch = model.config, recipe.data.seq_len, recipe.training.global_batch_size
    precision = choose_precision(recipe.training.precision, device)
    optimizers = Optimizers(model, recipe.optim)
    objective = NextToken([1] * config.vocab_size, device)
    tokens = torch.randint(config.vocab_size, (micro_batch, seq_len), device=device)
    sequences = TensorBatch(tokens, tokens, None, torch.arange(tokens.numel(), device=device))

    def micro_step() -> None:
        with precision.autocast():
            output = objective.loss(model, sequences)
        (output.loss_sum / output.count).backward()

    model.train()
    timed(micro_step, device)  # the first of each is slower
    timed(optimizers.step, device)
    parts = [timed(micro_step, device)]
    optimizing = timed(optimizers.step, device)
    while sum(parts) < seconds:
        parts.append(timed(micro_step, device))
    optimizers.zero_grad()
    return batch * seq_len / (batch / micro_batch * float(median(parts)) + optimizing)


def timed(work: Callable[[], None], device: torch.device) -> float:
    """Seconds, with what the device still had to do of it."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - started
