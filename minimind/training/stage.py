"""A stage: from a recipe to a model or an adapter, through token stores, loop and checkpoints."""

import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from minimind.config import Role, dump_recipe, load_recipe, role_of
from minimind.config.settings import Recipe, TrainingSettings
from minimind.data.packing import MixedDataset
from minimind.errors import CheckpointError, ConfigError, ModelError
from minimind.model import Transformer, resolve_model_directory, save_adapter, save_model
from minimind.model.device import free_bytes
from minimind.model.directory import is_empty
from minimind.tokenizer import Tokenizer
from minimind.training.build import (
    Stores,
    base_sha256,
    build_mixes,
    build_model,
    build_objective,
    count_parameters,
    data_sha256,
    footprint,
    load_tokenizer,
    needs_base,
    open_stores,
)
from minimind.training.checkpoint import (
    best_step,
    inspect_checkpoints,
    load_checkpoint,
    newest_state,
    restore_weights,
)
from minimind.training.distributed import (
    SINGLE_PROCESS,
    ProcessGroup,
    init_distributed,
    local_device,
)
from minimind.training.lock import run_lock
from minimind.training.memory import choose_micro_batch, peak_bytes
from minimind.training.objectives.next_token import NextToken
from minimind.training.precision import choose_precision
from minimind.training.prolong import prolong
from minimind.training.reference_logprobs import compute_reference_logprobs
from minimind.training.reporter import Reporter, pluralize
from minimind.training.run import (
    TOKENIZER,
    changes_length,
    checkpoints,
    clear,
    finished_summary,
    has_begun,
    product,
    recipe_changes,
    write_atomically,
    write_recipe,
)
from minimind.training.state import TrainingResult
from minimind.training.trainer import Trainer
from minimind.training.validation import EvalSet

# (model, tokenizer) -> {"prompt", "text"} for each prompt; decoding is not this room's business.
WriteSamples = Callable[[Transformer, Tokenizer], list[dict[str, str]]]


@dataclass(frozen=True)
class StageResult:
    """What a stage left: a model directory or, with LoRA, an adapter; none if it was stopped."""

    run: Path
    model: Path | None
    summary: dict[str, Any]
    adapter: Path | None = None

    @property
    def finished(self) -> bool:
        return bool(self.model or self.adapter)


def run_stage(
    recipe: Recipe,
    *,
    reporter: Reporter,
    fresh: bool = False,
    write_samples: WriteSamples = lambda model, tokenizer: [],
) -> StageResult:
    """Run the stage that `recipe` describes in `recipe.out`, or go on with it, or find it done.

    Every process of a run that several share calls it; the first one does what is to be done once.
    Raises ConfigError when the run directory holds a run of another recipe, and whatever reading
    the data, the tokenizer and the model raises.
    """
    run = _run_directory(recipe)
    with init_distributed(recipe.device) as workers:
        if not workers.is_main:
            summary = workers.broadcast_object(None)
            if summary is not None:
                return _result(recipe, run, summary)
            return _run(recipe, run, workers, Reporter(), lambda model, tokenizer: [], {})
        run.mkdir(parents=True, exist_ok=True)
        with run_lock(run):
            if fresh:
                clear(run, recipe)
            changes = recipe_changes(run, recipe)
            done = None if changes_length(changes) else finished_summary(run, recipe)
            summary = workers.broadcast_object(done)
            if summary is not None:
                return _result(recipe, run, summary)
            return _run(recipe, run, workers, reporter, write_samples, changes)


def _result(recipe: Recipe, run: Path, summary: dict[str, Any]) -> StageResult:
    made = product(run, recipe)
    if recipe.lora:
        return StageResult(run, None, summary, adapter=made)
    return StageResult(run, made, summary)


@dataclass(frozen=True)
class Prepared:
    """A stage that is ready to train."""

    trainer: Trainer
    tokenizer: Tokenizer
    stores: Stores


def prepare_stage(
    recipe: Recipe,
    *,
    reporter: Reporter,
    write_samples: WriteSamples = lambda model, tokenizer: [],
    workers: ProcessGroup = SINGLE_PROCESS,
) -> Prepared:
    """Do everything that comes before training: model, token stores, windows.

    Raises whatever reading the data, the tokenizer and the model raises.
    """
    run = _run_directory(recipe)
    device = local_device(recipe.device, workers)
    share = _share(recipe.training, workers)
    precision = choose_precision(recipe.training.precision, device)
    free = free_bytes(device)  # before the weights are there, which the footprint counts
    saved = newest_state(run) or {}
    base = _check_base(recipe, run, saved)
    tokenizer, model = _start(recipe, run, device, saved)
    asked = recipe.training.micro_batch_size
    before = saved.get("micro_batch") if saved.get("processes") == workers.size else None
    micro_batch = choose_micro_batch(
        footprint(recipe, model, device),
        asked=asked,
        saved=before,
        batch=share,
        device=device,
        free=free,
        processes_per_device=workers.local_size if device.type == "cpu" else 1,
    )
    if before and micro_batch < min(before, asked or before):
        reporter.say(
            f"{pluralize(micro_batch, 'window')} at once instead of {before}: "
            f"no more fit into the memory that is free on {device}"
        )
    stores = open_stores(recipe, tokenizer, reporter)
    data, held_out, retention = build_mixes(recipe, tokenizer, stores, reporter)
    num_steps = recipe.training.steps or math.ceil(
        recipe.training.epochs * data.order.epoch_size / recipe.training.global_batch_size
    )
    trainer = Trainer(
        model=model,
        objective=build_objective(recipe, tokenizer, device),
        data=data,
        held_out=held_out,
        recipe=recipe,
        run=run,
        num_steps=num_steps,
        micro_batch_size=micro_batch,
        device=device,
        precision=precision,
        reporter=reporter,
        generate_samples=lambda: write_samples(model, tokenizer),
        data_sha256=data_sha256(stores),
        base_sha256=base,
        retention=EvalSet(NextToken(tokenizer.token_bytes, device), retention)
        if retention
        else None,
        validate_first=bool(recipe.model.init),
        group=workers,
    )
    _report(trainer)
    return Prepared(trainer, tokenizer, stores)


def _report(trainer: Trainer) -> None:
    """Say in one line what will be trained, on what, and for how long."""
    recipe, number = trainer.recipe, count_parameters(trainer.model)
    active = trainer.model.num_active_parameters
    trainer.reporter.say(
        f"{number:,} parameters"
        + (f" ({active:,} active per token)" if active < number else "")
        + (
            f", {count_parameters(trainer.model, trained=True):,} of them trained,"
            * bool(recipe.lora)
        )
        + f" in {trainer.group.size} processes" * (trainer.group.size > 1)
        + f" on {trainer.device} in {trainer.precision.name}; "
        f"{pluralize(trainer.data.order.epoch_size, 'sequence')} of {recipe.data.seq_len} tokens "
        "per epoch; "
        f"{pluralize(trainer.num_steps, 'step')} of "
        f"{pluralize(recipe.training.global_batch_size, 'sequence')}"
    )


def _check_base(recipe: Recipe, run: Path, saved: dict[str, Any]) -> str:
    """The sha256 of the base model's weights, or "" where checkpoints hold all that is needed.

    Raises CheckpointError when the run began with other weights, or when they are gone.
    """
    if not needs_base(recipe):
        return ""
    advice = "Put it back, choose another --out, or start over with --fresh"
    try:
        base = base_sha256(recipe)
    except ModelError as error:
        if not saved:
            raise
        raise CheckpointError(f"{run} needs the model that it began with: {error}. {advice}") from (
            error
        )
    if saved and saved.get("base_sha256") != base:
        raise CheckpointError(
            f"{run}: {recipe.model.init} is not the model that this run began with, and what was "
            f"trained beside it fits no other. {advice}"
        )
    return base


def _start(
    recipe: Recipe, run: Path, device: torch.device, saved: dict[str, Any]
) -> tuple[Tokenizer, Transformer]:
    """The tokenizer and the model that the stage begins with, or is resumed with."""
    tokenizer = load_tokenizer(recipe, run / TOKENIZER if saved else None)
    config = None if needs_base(recipe) else saved.get("config")
    model = build_model(recipe, tokenizer, device, saved=config)
    if tokenizer is None:
        raise ConfigError(
            "tokenizer is not set: a new model needs one. Make it with "
            "`minimind tokenizer train DATA --out DIR` and give --tokenizer DIR"
        )
    return tokenizer, model


def _share(settings: TrainingSettings, workers: ProcessGroup) -> int:
    """Windows of a batch that each process takes. Raises ConfigError if they are not as many."""
    share, rest = divmod(settings.global_batch_size, workers.size)
    if rest:
        raise ConfigError(
            f"training.global_batch_size={settings.global_batch_size} is not divisible by "
            f"{workers.size} processes; choose a multiple, or another number of processes"
        )
    if settings.micro_batch_size and share % settings.micro_batch_size:
        raise ConfigError(
            f"training.micro_batch_size={settings.micro_batch_size}: each of {workers.size} "
            f"processes takes {pluralize(share, 'sequence')} of a batch of "
            f"{settings.global_batch_size}; "
            f"choose a divisor of {share}"
        )
    return share


def _run(
    recipe: Recipe,
    run: Path,
    workers: ProcessGroup,
    reporter: Reporter,
    write_samples: WriteSamples,
    changes: dict[str, str],
) -> StageResult:
    if recipe.training.backend == "deepspeed" and workers is SINGLE_PROCESS:
        raise ConfigError(
            "training.backend: deepspeed shares work among processes that are started together: "
            "give --nproc N, or use torchrun or DeepSpeed's own launcher"
        )
    begun_here = has_begun(run)
    if workers.broadcast_object(begun_here) is False and begun_here:
        raise CheckpointError(
            f"{run} on {platform.node()} holds this run, and the first process, which is on "
            "another machine, does not. Let that machine be the first (torchrun --node-rank 0), or "
            "put the run on a disk that all share"
        )
    with workers.main_process_first():  # the others find the token stores that it has made
        prepared = prepare_stage(
            recipe, reporter=reporter, write_samples=write_samples, workers=workers
        )
    given = [dump_recipe(recipe.model_copy(update={"out": None})), prepared.trainer.data_sha256]
    given.append(prepared.trainer.base_sha256)
    if workers.broadcast_object(given) != given:
        raise ConfigError(
            f"process {workers.rank} of 0-{workers.size - 1} on {platform.node()} was given other "
            "settings or other data than the first one; give the same on every machine"
        )
    sizes = prepared.trainer.batch_sizes
    sizes.train = workers.broadcast_object(sizes.train)
    if workers.is_main:
        _record(prepared, changes)
    if recipe.objective == "dpo":
        compute_reference_logprobs(prepared.trainer)
    outcome = prepared.trainer.train()
    summary = _summary(prepared, outcome)
    if not outcome.finished:
        return StageResult(run, None, summary)
    if not workers.is_main:
        return _result(recipe, run, summary)
    summary |= _baseline(prepared)
    if recipe.lora:
        base = resolve_model_directory(Path(recipe.model.init or ""))
        save_adapter(product(run, recipe), prepared.trainer.model, recipe.lora, base)
    else:
        save_model(product(run, recipe), prepared.trainer.model, prepared.tokenizer)
    write_atomically(run / "summary.json", json.dumps(summary, ensure_ascii=False, indent=1))
    return _result(recipe, run, summary)


def _record(prepared: Prepared, changes: dict[str, str]) -> None:
    """Keep the recipe, and a copy of the tokenizer, in the run directory; report what changed."""
    trainer = prepared.trainer
    if changes_length(changes):
        prolong(trainer.run, trainer.recipe, trainer.num_steps, trainer.reporter.say)
    if operation := [changes[key] for key in changes if role_of(key) is Role.OPERATION]:
        trainer.reporter.say(f"changed since {trainer.run} began: {'; '.join(operation)}")
    write_recipe(trainer.run, trainer.recipe)
    if not checkpoints(trainer.run):
        prepared.tokenizer.save(trainer.run / TOKENIZER)


def _run_directory(recipe: Recipe) -> Path:
    if recipe.out is None:
        raise ConfigError("out is not set: where should the run be kept? Give --out DIR")
    run = Path(recipe.out)
    if run.exists() and not run.is_dir():
        raise ConfigError(f"{run} is a file; --out names the directory of a run")
    return run


def _summary(prepared: Prepared, outcome: TrainingResult) -> dict[str, Any]:
    trainer = prepared.trainer
    summary: dict[str, Any] = {
        "objective": trainer.recipe.objective,
        "parameters": count_parameters(trainer.model),
        "trained_parameters": count_parameters(trainer.model, trained=True),
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "seconds": outcome.elapsed_s,
        "tokens_per_second": outcome.tokens / max(outcome.elapsed_s, 1e-9),
        "device": str(trainer.device),
        "precision": trainer.precision.name,
        "peak_memory_bytes": peak_bytes(trainer.device),
    }
    if (active := trainer.model.num_active_parameters) < summary["parameters"]:
        summary["active_parameters"] = active
    if trainer.recipe.lora:
        summary["base"] = trainer.recipe.model.init
    first = {f"first_{name}": value for name, value in outcome.initial_validation.items()}
    best = outcome.best and {
        "best_step": outcome.best["step"],
        f"best_{outcome.best['metric']}": outcome.best["value"],
    }
    return summary | first | outcome.validation | best


def _baseline(prepared: Prepared) -> dict[str, float]:
    """What a model has to beat; it reads a good part of the data, so only a finished run has it."""
    trainer, tokenizer = prepared.trainer, prepared.tokenizer
    if trainer.recipe.objective != "pretrain" or trainer.held_out is None:
        return {}
    counts = sum(
        source.weight * store.unigram_counts(tokenizer.vocab_size)
        for source, store in zip(trainer.recipe.data.sources, prepared.stores.sources, strict=True)
    )
    bits = unigram_bits_per_byte(
        np.asarray(counts),
        trainer.held_out,
        trainer.recipe.validation.num_sequences,
        tokenizer.token_bytes,
    )
    return {"unigram_bits_per_byte": bits}


def unigram_bits_per_byte(
    counts: NDArray[np.float64],
    held_out: MixedDataset,
    num_sequences: int,
    token_bytes: Sequence[int],
) -> float:
    """Bits per byte of held-out windows if each token came with its frequency in training.

    counts: [vocab] occurrences in an epoch of the training text. Any model has to beat this.
    """
    bits_of = -np.log2((counts + 1) / (counts.sum() + len(counts)))
    bytes_of = np.asarray(token_bytes)
    labels = held_out.batch(0, min(num_sequences, held_out.order.epoch_size)).labels.reshape(-1)
    text = labels[bytes_of[labels] > 0]
    return float(bits_of[text].sum() / bytes_of[text].sum())


def extract_checkpoint(run: Path, step: int | None, out: Path) -> int:
    """Write the model, or the adapter, of a checkpoint of `run` to `out`; the best without `step`.

    Returns its step. Raises CheckpointError when it is not there, damaged, or of another base,
    ModelError when there is something in `out`.
    """
    if out.is_file() or (out.is_dir() and not is_empty(out)):
        raise ModelError(
            f"{out} is there already and would be lost; give another --out, or remove it first"
        )
    there = inspect_checkpoints(run, thorough=False)
    if not there:
        raise CheckpointError(
            f"{run}: there are no checkpoints; give a run directory that has some"
        )
    kept = ", ".join(f"{one.step:,}" for one in there)
    best = best_step(there) if step is None else None
    if step is None and best is None:
        raise CheckpointError(
            f"{run}: nothing tells which checkpoint is the best; give --step, one of {kept}"
        )
    step = best if step is None else step
    if step not in [one.step for one in there]:
        which = f"step {step:,}" + ", the best that is known" * (best is not None)
        raise CheckpointError(f"{run}: there is no checkpoint of {which}; kept are {kept}")
    checkpoint = load_checkpoint(run, step)
    recipe = load_recipe(run / "recipe.toml").recipe
    _check_base(recipe, run, checkpoint.state)
    tokenizer, model = _start(recipe, run, torch.device("cpu"), checkpoint.state)
    restore_weights(model, checkpoint)
    if recipe.lora:
        base = resolve_model_directory(Path(recipe.model.init or ""))
        save_adapter(out, model, recipe.lora, base)
    else:
        save_model(out, model, tokenizer)
    return step
