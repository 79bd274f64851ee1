"""Run a stage of training: resolve, lock, build, train, save the model, write the summary.

A stage is pretraining, supervised fine-tuning, LoRA or DPO. They differ in their recipe only: its
objective, its data, and the model it starts from.
"""

import contextlib
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minimind.config import Role, dump_recipe, role_of
from minimind.config.settings import Recipe, TrainingSettings
from minimind.errors import CheckpointError, ConfigError
from minimind.files import write_json
from minimind.model import Transformer, resolve_model_directory, save_adapter, save_model
from minimind.model.device import free_bytes
from minimind.tokenizer import Tokenizer
from minimind.training.build import (
    build_footprint,
    build_objective,
    build_tokenizer_and_model,
    check_backend_installed,
    check_base,
    count_parameters,
)
from minimind.training.checkpoint import latest_checkpoint, newest_state
from minimind.training.datasets import (
    Stores,
    build_datasets,
    data_origins,
    data_sha256,
    open_stores,
)
from minimind.training.distributed import (
    SINGLE_PROCESS,
    ProcessGroup,
    init_distributed,
    local_device,
)
from minimind.training.extend import Extension, extend_run, plan_extension
from minimind.training.lock import claim_directory
from minimind.training.memory import choose_micro_batch
from minimind.training.metrics import check_trackers
from minimind.training.objectives.next_token import NextToken
from minimind.training.precision import choose_precision
from minimind.training.reference_logprobs import compute_reference_logprobs
from minimind.training.reporter import Reporter, pluralize
from minimind.training.run import (
    SUMMARY_FILE,
    TOKENIZER_COPY,
    changes_num_steps,
    check_is_run,
    check_outside_data,
    check_removable,
    checkpoint_paths,
    finished_summary,
    has_begun,
    output_directory,
    recipe_changes,
    remove_run,
    run_directory,
    write_recipe,
)
from minimind.training.saving import check_data
from minimind.training.summary import summarize, unigram_baseline
from minimind.training.trainer import Trainer
from minimind.training.validation import EvalSet

# (model, tokenizer) -> [{"prompt", "text"}, …]: training does not import minimind.inference,
# so the caller provides the function that generates text at each validation.
GenerateSamples = Callable[[Transformer, Tokenizer], list[dict[str, str]]]


def _no_samples(model: Transformer, tokenizer: Tokenizer) -> list[dict[str, str]]:
    return []


@dataclass(frozen=True)
class StageResult:
    """The outcome of a stage: a model directory or, with LoRA, an adapter; neither if stopped.

    trained: False if the run was finished before, so that nothing was trained now.
    """

    run: Path
    model: Path | None
    summary: dict[str, Any]
    adapter: Path | None = None
    trained: bool = True

    @property
    def finished(self) -> bool:
        return bool(self.model or self.adapter)


@dataclass(frozen=True)
class PreparedStage:
    """A stage that is ready for its first step."""

    trainer: Trainer
    tokenizer: Tokenizer
    stores: Stores


def run_stage(
    recipe: Recipe,
    *,
    reporter: Reporter,
    fresh: bool = False,
    generate_samples: GenerateSamples = _no_samples,
) -> StageResult:
    """Run or resume the stage of `recipe` in `recipe.out`; return the result if it is finished.

    Every process of a distributed run calls this. fresh: remove the earlier run, as soon as the new
    one is ready to start. Raises ConfigError if the directory holds a run of another recipe, and
    the errors of loading the data, the tokenizer and the model.
    """
    with _prepare_start(recipe, reporter, fresh, generate_samples) as start:
        run, stage = start.run, start.stage
        if stage is None:
            start.reporter.say(f"{_describe_finished(start)}; nothing was trained")
            return replace(_result(recipe, run, start.summary or {}), trained=False)
        trainer, group = stage.trainer, stage.trainer.group
        if group.is_main:
            _record_start(start, stage)
        if recipe.objective == "dpo":
            compute_reference_logprobs(trainer)

        result = trainer.train()
        summary = summarize(trainer, result)
        if not result.finished:
            return StageResult(run, None, summary)
        if group.is_main:
            summary |= unigram_baseline(trainer, stage.stores, stage.tokenizer)
            summary |= data_origins(stage.stores)
            save_output(output_directory(run, recipe), recipe, trainer.model, stage.tokenizer)
            write_json(run / SUMMARY_FILE, summary)
        return _result(recipe, run, summary)


def dry_run(recipe: Recipe, *, reporter: Reporter, fresh: bool = False) -> None:
    """Prepare the stage of `recipe`, and report what `run_stage` would do with the run directory.

    Leaves the run directory as it is. Raises the errors that `run_stage` would raise.
    """
    with _prepare_start(recipe, reporter, fresh, _no_samples) as start:
        if start.stage is None or start.stage.trainer.group.is_main:
            start.reporter.say(f"Without --dry-run: {_describe_start(start)}")


@dataclass(frozen=True)
class _Start:
    """How a stage starts, before any file is changed. Other ranks than 0 know only a part."""

    run: Path
    reporter: Reporter
    fresh: bool
    summary: dict[str, Any] | None = None  # of a finished run, which is not repeated
    stage: PreparedStage | None = None  # None if the run is finished
    extension: Extension | None = None


@contextlib.contextmanager
def _prepare_start(
    recipe: Recipe, reporter: Reporter, fresh: bool, generate_samples: GenerateSamples
) -> Iterator[_Start]:
    """Claim the run directory, compare its run with the recipe, and prepare the stage.

    No file of the run is changed yet, so that a refusal leaves everything as it was.
    """
    run = run_directory(recipe)
    with init_distributed(recipe.device) as group, contextlib.ExitStack() as stack:
        changes: dict[str, str] = {}
        summary = None
        if group.is_main:
            stack.enter_context(claim_directory(run))
            check_is_run(run, fresh)
            check_outside_data(run, recipe)
            if fresh:
                check_removable(run, recipe)
            else:
                changes = recipe_changes(run, recipe)
                if not changes_num_steps(changes):
                    summary = finished_summary(run, recipe)
        else:
            reporter, generate_samples = Reporter(), _no_samples
        summary = group.broadcast_object(summary)
        if summary is not None:
            yield _Start(run, reporter, fresh, summary)
            return

        _check_launch(recipe, run, group, fresh)
        with group.main_process_first():  # the others open the token stores that it has written
            stage = prepare_stage(
                recipe,
                reporter=reporter,
                fresh=fresh,
                generate_samples=generate_samples,
                group=group,
            )
        _check_same_on_all_ranks(stage.trainer)
        sizes = stage.trainer.batch_sizes
        sizes.train = group.broadcast_object(sizes.train)
        extension = None
        if changes_num_steps(changes):
            extension = plan_extension(run, recipe, stage.trainer.num_steps)
        if recipe.training.micro_batch_size not in (None, sizes.train):
            changes.pop("training.micro_batch_size", None)  # without effect, as just reported
        if operation := [changes[key] for key in changes if role_of(key) is Role.OPERATION]:
            reporter.say(f"changed since {run} began: {'; '.join(operation)}")
        yield _Start(run, reporter, fresh, None, stage, extension)


def _describe_finished(start: _Start) -> str:
    steps = (start.summary or {})["steps"]
    return f"{start.run} is already finished, after {pluralize(steps, 'step')}"


def _describe_start(start: _Start) -> str:
    """Describe in a line what becomes of the run. Raises CheckpointError if it cannot resume."""
    if start.stage is None:
        return f"{_describe_finished(start)}, so nothing is trained"
    if start.extension:
        return start.extension.description
    if start.fresh and has_begun(start.run):
        return f"the run in {start.run} is removed, and a new one begins"
    checkpoint = latest_checkpoint(start.run, warn=start.reporter.say)
    if checkpoint:
        return f"the run in {start.run} resumes from step {checkpoint.step:,}"
    return f"a new run begins in {start.run}"


def _result(recipe: Recipe, run: Path, summary: dict[str, Any]) -> StageResult:
    output = output_directory(run, recipe)
    if recipe.lora:
        return StageResult(run, None, summary, adapter=output)
    return StageResult(run, output, summary)


def prepare_stage(
    recipe: Recipe,
    *,
    reporter: Reporter,
    fresh: bool = False,
    generate_samples: GenerateSamples = _no_samples,
    group: ProcessGroup = SINGLE_PROCESS,
) -> PreparedStage:
    """Build the model, the datasets and the trainer. Writes nothing into the run directory.

    fresh: ignore the checkpoints there. Raises the errors of loading the data, the tokenizer and
    the model, and CheckpointError if the run there began with other data.
    """
    run = run_directory(recipe)
    check_backend_installed(recipe)
    if group.is_main:
        check_trackers(recipe.training.trackers)
    device = local_device(recipe.device, group)
    sequences_per_process = _sequences_per_process(recipe.training, group)
    precision = choose_precision(recipe.training.precision, device)
    free = free_bytes(device)  # before the model is loaded: its footprint counts the weights
    state = ({} if fresh else newest_state(run)) or {}
    base = check_base(recipe, run, state)
    tokenizer, model = build_tokenizer_and_model(recipe, run, device, state)
    requested = recipe.training.micro_batch_size
    saved = state.get("micro_batch") if state.get("processes") == group.size else None
    micro_batch = choose_micro_batch(
        build_footprint(recipe, model, device, group.size),
        requested=requested,
        saved=saved,
        num_sequences=sequences_per_process,
        device=device,
        free=free,
        processes_per_device=group.local_size if device.type == "cpu" else 1,
    )
    if saved and micro_batch < min(saved, requested or saved):
        reporter.say(
            f"micro-batch size {micro_batch} instead of {saved}: "
            f"no more sequences fit into the memory that is free on {device}"
        )
    elif saved and requested and micro_batch < requested:
        reporter.say(f"micro-batch size {micro_batch}, that of the checkpoint, is kept")
    stores = open_stores(recipe, tokenizer, reporter)
    sha256 = data_sha256(stores)
    if state:
        check_data(run, state["data_sha256"], sha256)
    datasets = build_datasets(recipe, tokenizer, stores, reporter)
    num_steps = recipe.training.steps or math.ceil(
        recipe.training.epochs * datasets.train.order.epoch_size / recipe.training.global_batch_size
    )
    next_token = NextToken(tokenizer.token_bytes, device)
    trainer = Trainer(
        model=model,
        objective=build_objective(recipe, tokenizer, device),
        data=datasets.train,
        validation_data=datasets.validation,
        recipe=recipe,
        run=run,
        num_steps=num_steps,
        micro_batch_size=micro_batch,
        device=device,
        precision=precision,
        reporter=reporter,
        generate_samples=lambda: generate_samples(model, tokenizer),
        data_sha256=sha256,
        base_sha256=base,
        retention=EvalSet(next_token, datasets.retention) if datasets.retention else None,
        validate_first=bool(recipe.model.init),
        group=group,
    )
    reporter.say(_describe(trainer))
    return PreparedStage(trainer, tokenizer, stores)


def _sequences_per_process(settings: TrainingSettings, group: ProcessGroup) -> int:
    """Return the sequences of a global batch per process. Raises ConfigError for a remainder."""
    share, remainder = divmod(settings.global_batch_size, group.size)
    if remainder:
        raise ConfigError(
            f"training.global_batch_size={settings.global_batch_size} is not divisible by "
            f"{group.size} processes; choose a multiple, or another number of processes"
        )
    if settings.micro_batch_size and share % settings.micro_batch_size:
        raise ConfigError(
            f"training.micro_batch_size={settings.micro_batch_size} does not divide the "
            f"{pluralize(share, 'sequence')} per process (global batch size "
            f"{settings.global_batch_size}, {group.size} processes); "
            f"choose a divisor of {share}"
        )
    return share


def _describe(trainer: Trainer) -> str:
    """Describe the model, the device, the data and the number of steps in one line."""
    recipe, total = trainer.recipe, count_parameters(trainer.model)
    active = trainer.model.num_active_parameters
    trained = count_parameters(trainer.model, trained=True)
    return (
        f"{total:,} parameters"
        + (f" ({active:,} active per token)" if active < total else "")
        + f", {trained:,} of them trained," * bool(recipe.lora)
        + f" in {trainer.group.size} processes" * (trainer.group.size > 1)
        + f" on {trainer.device} in {trainer.precision.name}; "
        f"{pluralize(trainer.data.order.epoch_size, 'sequence')} of {recipe.data.seq_len} tokens "
        f"per epoch; {pluralize(trainer.num_steps, 'step')} of "
        f"{pluralize(recipe.training.global_batch_size, 'sequence')}"
    )


def _check_launch(recipe: Recipe, run: Path, group: ProcessGroup, fresh: bool) -> None:
    """Raise ConfigError for a wrong launch, CheckpointError if rank 0 does not see the run."""
    if recipe.training.backend == "deepspeed" and group is SINGLE_PROCESS:
        raise ConfigError(
            "training.backend: deepspeed shards state over processes that are launched together: "
            "give --nproc N, or use torchrun or DeepSpeed's own launcher"
        )
    begun_here = has_begun(run) and not fresh
    if group.broadcast_object(begun_here) is False and begun_here:
        raise CheckpointError(
            f"{run} exists on {platform.node()}, but not on the machine of process 0. Make this "
            "machine the first (torchrun --node-rank 0), or put the run on a disk that all "
            "machines share"
        )


def _check_same_on_all_ranks(trainer: Trainer) -> None:
    """Raise ConfigError if this process has other settings, data or base weights than rank 0."""
    recipe, group = trainer.recipe.model_copy(update={"out": None}), trainer.group
    identity = [dump_recipe(recipe), trainer.data_sha256, trainer.base_sha256]
    if group.broadcast_object(identity) != identity:
        raise ConfigError(
            f"process {group.rank} of 0-{group.size - 1} on {platform.node()} has settings, "
            "data or a base model that differ from those of process 0; "
            "give the same on every machine"
        )


def _record_start(start: _Start, stage: PreparedStage) -> None:
    """Remove the earlier run if a fresh one was requested, or extend it; record the recipe."""
    run = start.run
    if start.fresh:
        remove_run(run)
    if start.extension:
        start.reporter.say(start.extension.description)
        extend_run(run, start.extension)
    write_recipe(run, stage.trainer.recipe)
    if not checkpoint_paths(run):
        stage.tokenizer.save(run / TOKENIZER_COPY)


def save_output(output: Path, recipe: Recipe, model: Transformer, tokenizer: Tokenizer) -> None:
    """Save the trained model directory or, with LoRA, the adapter."""
    if recipe.lora:
        base = resolve_model_directory(Path(recipe.model.init or ""))
        save_adapter(output, model, recipe.lora, base)
    else:
        save_model(output, model, tokenizer)
