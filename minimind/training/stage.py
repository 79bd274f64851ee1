"""A stage: from a recipe to a model or an adapter, through token stores, loop and checkpoints."""

import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from minimind.config import difference, dump_recipe, load_recipe
from minimind.config.model import RopeKind
from minimind.config.settings import Recipe, TrainingSettings
from minimind.data.packing import ChatWindows, Mix, PairWindows, TextWindows, Windows
from minimind.data.read import first_record
from minimind.data.store import Kind, Split, TokenStore, default_folder, open_store
from minimind.data.textbook import textbook_file
from minimind.errors import CheckpointError, ConfigError, DataError, ModelError, install_line
from minimind.model import (
    Transformer,
    apply_lora,
    load_model,
    resolve_model_directory,
    save_adapter,
    save_model,
)
from minimind.model.directory import is_empty, is_stray
from minimind.tokenizer import Tokenizer
from minimind.training.checkpoint import (
    best_step,
    inspect_checkpoints,
    load_checkpoint,
    restore_weights,
)
from minimind.training.distributed import ALONE, Workers, join, own_device
from minimind.training.lock import run_lock
from minimind.training.loop import Measured, Outcome, Trainer, train
from minimind.training.memory import Footprint, choose_micro_batch, peak_bytes
from minimind.training.objectives import Objective
from minimind.training.objectives.next_token import NextToken
from minimind.training.objectives.preference import Preference
from minimind.training.optimizers import count_moments
from minimind.training.precision import choose_precision
from minimind.training.reference import FILE as REFERENCE
from minimind.training.reference import fill_references
from minimind.training.reporter import Reporter, counted

_KINDS: dict[str, Kind] = {"pretrain": "text", "sft": "chat", "dpo": "pairs"}
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
    with join(recipe.device) as workers:
        if not workers.is_first:
            summary = workers.tell(None)
            if summary is not None:
                return _result(recipe, run, summary)
            return _run(recipe, run, workers, Reporter(), lambda model, tokenizer: [])
        run.mkdir(parents=True, exist_ok=True)
        with run_lock(run):
            if fresh:
                _clear(run, recipe)
            _keep_recipe(run, recipe)
            summary_file = run / "summary.json"
            made = summary_file.is_file() and (run / _made(recipe)).is_dir()
            summary = workers.tell(json.loads(summary_file.read_text("utf-8")) if made else None)
            if summary is not None:
                return _result(recipe, run, summary)
            return _run(recipe, run, workers, reporter, write_samples)


def _made(recipe: Recipe) -> str:
    """What the stage leaves in its run directory."""
    return "adapter" if recipe.lora else "model"


def _result(recipe: Recipe, run: Path, summary: dict[str, Any]) -> StageResult:
    if recipe.lora:
        return StageResult(run, None, summary, adapter=run / "adapter")
    return StageResult(run, run / "model", summary)


@dataclass(frozen=True)
class Prepared:
    """A stage that is ready to train."""

    job: Trainer
    tokenizer: Tokenizer
    stores: "_Stores"


def prepare_stage(
    recipe: Recipe,
    *,
    reporter: Reporter,
    write_samples: WriteSamples = lambda model, tokenizer: [],
    workers: Workers = ALONE,
) -> Prepared:
    """Do everything that comes before training: model, token stores, windows.

    Raises whatever reading the data, the tokenizer and the model raises.
    """
    run = _run_directory(recipe)
    device = own_device(recipe.device, workers)
    share = _share(recipe.training, workers)
    _check_engine(recipe)
    precision = choose_precision(recipe.training.precision, device)
    tokenizer, model = _start(recipe, device)
    num_parameters = _count(model)
    micro_batch = choose_micro_batch(
        footprint(recipe, model, device),
        asked=recipe.training.micro_batch,
        batch=share,
        device=device,
        sharers=workers.local_size if device.type == "cpu" else 1,
    )
    stores = _stores(recipe, tokenizer, reporter)
    data, held_out, general = _mixes(recipe, tokenizer, stores, reporter)
    num_steps = recipe.training.steps or math.ceil(
        recipe.training.epochs * data.order.epoch_size / recipe.training.batch
    )
    active = model.num_active_parameters
    at_work = f" ({active:,} at work on a token)" if active < num_parameters else ""
    reporter.say(
        f"{num_parameters:,} parameters{at_work}"
        + (f", {_count(model, trained=True):,} of them trained," if recipe.lora else "")
        + (f" in {workers.size} processes" if workers.size > 1 else "")
        + f" on {device} in {precision.name}; {counted(data.order.epoch_size, 'window')} of "
        f"{recipe.data.window} tokens an epoch; {counted(num_steps, 'step')} of "
        f"{counted(recipe.training.batch, 'window')}"
    )
    job = Trainer(
        model=model,
        objective=_objective(recipe, tokenizer, device),
        data=data,
        held_out=held_out,
        recipe=recipe,
        run=run,
        num_steps=num_steps,
        micro_batch=micro_batch,
        device=device,
        precision=precision,
        reporter=reporter,
        write_samples=lambda: write_samples(model, tokenizer),
        data_sha256=_data_sha256(stores),
        base_sha256=_base_sha256(recipe),
        general=Measured(NextToken(tokenizer.token_bytes, device), general) if general else None,
        validate_first=bool(recipe.model.init),
        workers=workers,
    )
    return Prepared(job, tokenizer, stores)


def _check_engine(recipe: Recipe) -> None:
    """Raises ConfigError when DeepSpeed is asked for what it cannot do here."""
    if recipe.training.engine != "deepspeed":
        return
    if find_spec("deepspeed") is None:
        raise ConfigError(
            f"training.engine: deepspeed is not installed; {install_line('deepspeed')}"
        )
    if recipe.optim.name != "adamw":
        raise ConfigError('training.engine: deepspeed trains by AdamW; set optim.name = "adamw"')
    if recipe.training.compile:
        raise ConfigError("training.engine: deepspeed does not go with training.compile")


def _share(settings: TrainingSettings, workers: Workers) -> int:
    """Windows of a batch that each process takes. Raises ConfigError if they are not as many."""
    share, rest = divmod(settings.batch, workers.size)
    if rest:
        raise ConfigError(
            f"training.batch={settings.batch} cannot be shared out evenly to {workers.size} "
            "processes; choose a multiple, or another number of processes"
        )
    if settings.micro_batch and share % settings.micro_batch:
        raise ConfigError(
            f"training.micro_batch={settings.micro_batch}: each of {workers.size} processes takes "
            f"{counted(share, 'window')} of a batch of {settings.batch}; "
            f"choose a divisor of {share}"
        )
    return share


def _run(
    recipe: Recipe, run: Path, workers: Workers, reporter: Reporter, write_samples: WriteSamples
) -> StageResult:
    if recipe.training.engine == "deepspeed" and workers is ALONE:
        raise ConfigError(
            "training.engine: deepspeed shares work among processes that are started together: "
            "give --nproc N, or use torchrun or DeepSpeed's own launcher"
        )
    begun_here = (run / "checkpoints").is_dir()
    if workers.tell(begun_here) is False and begun_here:
        raise CheckpointError(
            f"{run} on {platform.node()} holds this run, and the first process, which is on "
            "another machine, does not. Let that machine be the first (torchrun --node-rank 0), or "
            "put the run on a disk that all share"
        )
    with workers.first_in_turn():  # the others find the token stores that it has made
        prepared = prepare_stage(
            recipe, reporter=reporter, write_samples=write_samples, workers=workers
        )
    given = [dump_recipe(recipe.model_copy(update={"out": None})), prepared.job.data_sha256]
    if workers.tell(given) != given:
        raise ConfigError(
            f"process {workers.rank} of 0-{workers.size - 1} on {platform.node()} was given other "
            "settings or other data than the first one; give the same on every machine"
        )
    prepared.job.micro_batch = workers.tell(prepared.job.micro_batch)
    if recipe.objective == "dpo":
        fill_references(prepared.job)
    outcome = train(prepared.job)
    summary = _summary(prepared, outcome)
    if not outcome.finished:
        return StageResult(run, None, summary)
    if not workers.is_first:
        return _result(recipe, run, summary)
    summary |= _baseline(prepared)
    if recipe.lora:
        base = resolve_model_directory(Path(recipe.model.init or ""))
        save_adapter(run / "adapter", prepared.job.model, recipe.lora, base)
    else:
        save_model(run / "model", prepared.job.model, prepared.tokenizer)
    _write_atomically(run / "summary.json", json.dumps(summary, ensure_ascii=False, indent=1))
    return _result(recipe, run, summary)


def footprint(recipe: Recipe, model: Transformer, device: torch.device) -> Footprint:
    """What memory a step of the stage depends on."""
    return Footprint(
        model.config,
        _count(model),
        _count(model, trained=True),
        count_moments(model, recipe.optim),
        recipe.data.window,
        device.type,
        recipe.training.activation_checkpointing,
    )


def _count(model: Transformer, *, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def _run_directory(recipe: Recipe) -> Path:
    if recipe.out is None:
        raise ConfigError("out is not set: where should the run be kept? Give --out DIR")
    run = Path(recipe.out)
    if run.exists() and not run.is_dir():
        raise ConfigError(f"{run} is a file; --out names the directory of a run")
    return run


def _clear(run: Path, recipe: Recipe) -> None:
    """Forget an earlier run: only what a run is made of is removed.

    Raises ConfigError when the stage is to begin with what would be removed.
    """
    for needed in (recipe.model.init, recipe.tokenizer):
        if needed and Path(needed).resolve() in (run.resolve(), (run / "model").resolve()):
            raise ConfigError(
                f"{needed} would be removed by --fresh, and the run needs it; choose another --out"
            )
    # In this order: what is half removed is neither a finished run nor one of another recipe.
    for name in ("summary.json", "report.html", "report.md", "metrics.jsonl", REFERENCE):
        (run / name).unlink(missing_ok=True)
    for name in ("model", "adapter", "tensorboard", "report-plots", "checkpoints"):
        if (run / name).exists():
            shutil.rmtree(run / name)
    (run / "recipe.toml").unlink(missing_ok=True)


def _keep_recipe(run: Path, recipe: Recipe) -> None:
    """Write the resolved recipe, or check that the one that is there is the same."""
    kept = run / "recipe.toml"
    begun = any((run / name).is_dir() for name in ("checkpoints", "model", "adapter"))
    if kept.is_file() and begun:  # else a mistake ended it early, and there is nothing to lose
        begun_with = load_recipe(kept).recipe
        # Only its place may have changed.
        changes = difference(begun_with.model_copy(update={"out": recipe.out}), recipe)
        if changes:
            raise ConfigError(
                f"{run} holds a run of another recipe: "
                + "; ".join(changes)
                + ". Go on with the same settings, choose another --out, or start over with --fresh"
            )
    else:
        _write_atomically(kept, dump_recipe(recipe))


def _write_atomically(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def new_model(recipe: Recipe, tokenizer: Tokenizer) -> Transformer:
    """The model that the recipe begins with when it begins from zero, on the CPU."""
    torch.manual_seed(recipe.seed)
    return Transformer(recipe.model.shape(tokenizer.vocab_size))


def _start(recipe: Recipe, device: torch.device) -> tuple[Tokenizer, Transformer]:
    """The tokenizer and the model that the stage begins with."""
    if recipe.lora and not recipe.model.init:
        raise ConfigError("lora: adapters are made for a model that is there; give --model MODEL")
    if recipe.lora and recipe.optim.name != "adamw":
        raise ConfigError('lora: adapters are trained with AdamW; set optim.name = "adamw"')
    if recipe.lora and recipe.model.context:
        raise ConfigError(
            f"lora: an adapter does not remember model.context={recipe.model.context}, and would "
            "be used beside a model that is not stretched; stretch the model first, by "
            "`minimind sft` with model.context, and give that one"
        )
    if recipe.model.init:
        directory = resolve_model_directory(Path(recipe.model.init))
        tokenizer = Tokenizer.load(Path(recipe.tokenizer) if recipe.tokenizer else directory)
        model = load_model(directory, device=device)
        tokenizer.check_model(Path(recipe.tokenizer or directory), model.config.vocab_size)
    elif recipe.tokenizer:
        tokenizer = Tokenizer.load(Path(recipe.tokenizer))
        model = new_model(recipe, tokenizer).to(device)
    else:
        raise ConfigError(
            "tokenizer is not set: a new model needs one. Make it with "
            "`minimind tokenizer train DATA --out DIR` and give --tokenizer DIR"
        )
    fit_context(recipe, model)
    if recipe.lora:
        torch.manual_seed(recipe.seed)
        apply_lora(model, recipe.lora)
    model.activation_checkpointing = recipe.training.activation_checkpointing
    return tokenizer, model


def fit_context(recipe: Recipe, model: Transformer) -> None:
    """Stretch the model's context as the recipe says. Raises ConfigError for longer windows."""
    if recipe.model.context:
        _stretch(model, recipe.model.context, recipe.model.rope_scaling)
    if recipe.data.window > model.config.max_position_embeddings:
        raise ConfigError(
            f"data.window ({recipe.data.window}) is longer than the model's context "
            f"({model.config.max_position_embeddings}); lower it, or "
            + ("stretch the model first, by `minimind sft` with " if recipe.lora else "raise ")
            + ("model.context" if recipe.model.init else "model.max_position_embeddings")
        )


def _stretch(model: Transformer, context: int, kind: RopeKind | None) -> None:
    own = model.config.max_position_embeddings
    if context < own:
        raise ConfigError(
            f"model.context={context} is within what the model reads as it is, {own} tokens; "
            "leave it out"
        )
    model.extend_context(context, kind)


@dataclass(frozen=True)
class _Stores:
    sources: list[TokenStore]
    validation: list[TokenStore]  # when held-out data is given on its own
    general: list[TokenStore]

    @property
    def all(self) -> list[TokenStore]:
        return [*self.sources, *self.validation, *self.general]


def _stores(recipe: Recipe, tokenizer: Tokenizer, reporter: Reporter) -> _Stores:
    settings = recipe.data
    if not settings.sources:
        raise ConfigError("data.sources is empty: give --data FILE, or set it in the recipe")
    own = bool(settings.validation)
    folder = Path(settings.store) if settings.store else default_folder()
    objective_kind = _KINDS[recipe.objective]

    def opened(path: str, fraction: float = 0.0, kind: Kind = objective_kind) -> TokenStore:
        path = textbook_file(path, folder, settings.fill)
        begun = False

        def progress(done: int, total: int) -> None:
            nonlocal begun
            if not begun:  # not of a store that is there
                reporter.start(f"tokenizing {path}", total, unit="byte")
                begun = True
            reporter.progress(done, total)

        try:
            return open_store(
                path,
                tokenizer,
                kind=kind,
                schema=settings.record_schema,
                fill=settings.fill,
                validation_fraction=fraction,
                max_bad_fraction=settings.max_bad_fraction,
                folder=folder,
                progress=progress,
                say=reporter.say,
            )
        finally:
            reporter.stop()

    general = [textbook_file(path, folder, settings.fill) for path in settings.general]
    stores = _Stores(
        [
            opened(source.path, 0.0 if own else settings.validation_fraction)
            for source in settings.sources
        ],
        [opened(path) for path in settings.validation],
        [opened(path, kind=_kind_of(path, settings.record_schema)) for path in general],
    )
    filled = [store.manifest["filled"] for store in stores.all]
    for key in sorted(settings.fill.keys() - set().union(*filled)):
        reporter.say(f"data.fill.{key} fills nothing: no record holds {{{{{key}}}}}")
    return stores


def _objective(recipe: Recipe, tokenizer: Tokenizer, device: torch.device) -> Objective:
    balance = recipe.training.router_balance
    if recipe.objective == "dpo":
        return Preference(recipe.dpo, router_balance=balance)
    return NextToken(tokenizer.token_bytes, device, router_balance=balance)


def _kind_of(path: str, schema: str) -> Kind:
    """A general set is what it is, whatever the objective: conversations or running text."""
    return "chat" if first_record(path, schema).messages else "text"


def _data_sha256(stores: _Stores) -> str:
    """What a run may not change under its feet: texts, and how they became tokens."""
    keys = ("kind", "schema", "fill", "validation_fraction", "tokenizer_sha256")
    described = [
        [store.manifest[key] for key in keys] + [file["sha256"] for file in store.manifest["files"]]
        for store in stores.all
    ]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _base_sha256(recipe: Recipe) -> str:
    """Which weights an adapter is trained beside, or preferences start from; else ""."""
    if not recipe.model.init or not (recipe.lora or recipe.objective == "dpo"):
        return ""
    digest = hashlib.sha256()
    for file in sorted(resolve_model_directory(Path(recipe.model.init)).glob("*.safetensors")):
        if is_stray(file.name):
            continue
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _mixes(
    recipe: Recipe, tokenizer: Tokenizer, stores: _Stores, reporter: Reporter
) -> tuple[Mix, Mix | None, list[Mix]]:
    """Training data as a weighted mix, held-out data, and general sets, each cut into windows."""

    def windows(store: TokenStore, split: Split) -> Windows:
        shards = store.shards(split)
        if store.manifest["kind"] == "text":
            return TextWindows(shards, recipe.data.window)
        pairs = store.manifest["kind"] == "pairs"
        packed = (PairWindows if pairs else ChatWindows)(
            shards, recipe.data.window, pad=tokenizer.end_of_text, seed=recipe.seed
        )
        if split == "train" and store in stores.sources:
            report = packed.report
            alike = f", {report.identical:,} because both sides are the same" * pairs
            reporter.say(
                f"{counted(report.conversations, 'pair' if pairs else 'conversation')} in "
                f"{counted(report.windows, 'window')}, {report.fill:.1%} full; {report.cut:,} cut "
                f"at the window's end, {report.unsupervised:,} left out because no answer was "
                f"left{alike}"
            )
        return packed

    weights = [source.weight for source in recipe.data.sources]
    data = Mix([windows(store, "train") for store in stores.sources], weights, recipe.seed)
    if not data.order.epoch_size:
        raise DataError(
            f"the data gives not one window of {recipe.data.window} tokens; "
            "use more text, or a smaller data.window"
        )
    parts = [windows(store, "train") for store in stores.validation] or [
        windows(store, "validation") for store in stores.sources
    ]
    held_out = Mix(parts, [1.0] * len(parts), recipe.seed)
    if not held_out.order.epoch_size:
        reporter.say("too little text is held out for a validation; give data.validation")
    general = [Mix([windows(store, "train")], [1.0], recipe.seed) for store in stores.general]
    return (
        data,
        held_out if held_out.order.epoch_size else None,
        [mix for mix in general if mix.order.epoch_size],
    )


def _summary(prepared: Prepared, outcome: Outcome) -> dict[str, Any]:
    job = prepared.job
    summary: dict[str, Any] = {
        "objective": job.recipe.objective,
        "parameters": _count(job.model),
        "trained_parameters": _count(job.model, trained=True),
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "seconds": outcome.elapsed_s,
        "tokens_per_second": outcome.tokens / max(outcome.elapsed_s, 1e-9),
        "device": str(job.device),
        "precision": job.precision.name,
        "peak_memory_bytes": peak_bytes(job.device),
    }
    if (active := job.model.num_active_parameters) < summary["parameters"]:
        summary["active_parameters"] = active
    if job.recipe.lora:
        summary["base"] = job.recipe.model.init
    first = {f"first_{name}": value for name, value in outcome.first.items()}
    best = outcome.best and {
        "best_step": outcome.best["step"],
        f"best_{outcome.best['figure']}": outcome.best["value"],
    }
    return summary | first | outcome.validation | best


def _baseline(prepared: Prepared) -> dict[str, float]:
    """What a model has to beat; it reads a good part of the data, so only a finished run has it."""
    job, tokenizer = prepared.job, prepared.tokenizer
    if job.recipe.objective != "pretrain" or job.held_out is None:
        return {}
    counts = sum(s.unigram_counts(tokenizer.vocab_size) for s in prepared.stores.sources)
    bits = unigram_bits_per_byte(
        np.asarray(counts), job.held_out, job.recipe.validation.windows, tokenizer.token_bytes
    )
    return {"unigram_bits_per_byte": bits}


def unigram_bits_per_byte(
    counts: NDArray[np.int64], held_out: Mix, num_windows: int, token_bytes: Sequence[int]
) -> float:
    """Bits per byte of held-out windows if each token came with its frequency in training.

    counts: [vocab] occurrences in the training text. The baseline that any model has to beat.
    """
    bits_of = -np.log2((counts + 1) / (counts.sum() + len(counts)))
    bytes_of = np.asarray(token_bytes)
    labels = held_out.batch(0, min(num_windows, held_out.order.epoch_size)).labels.reshape(-1)
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
    if checkpoint.state["base_sha256"] != _base_sha256(recipe):
        raise CheckpointError(
            f"{run}: {recipe.model.init} is not the model that this run began with"
        )
    tokenizer, model = _start(recipe, torch.device("cpu"))
    restore_weights(model, checkpoint)
    if recipe.lora:
        base = resolve_model_directory(Path(recipe.model.init or ""))
        save_adapter(out, model, recipe.lora, base)
    else:
        save_model(out, model, tokenizer)
    return step
