"""The one training loop: every stage is this loop with another objective."""

import contextlib
import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from minimind.config.settings import Recipe
from minimind.data.packing import MixedDataset
from minimind.errors import CheckpointError, ResourceError, TrainingError, is_out_of_memory
from minimind.model import Transformer
from minimind.training.backend import Backend, TorchBackend
from minimind.training.batch import Prefetcher, to_device
from minimind.training.checkpoint import latest_checkpoint, restore_weights
from minimind.training.checkpoint_writer import CheckpointWriter
from minimind.training.distributed import SINGLE_PROCESS, ProcessGroup
from minimind.training.extend import stable_steps
from minimind.training.memory import divisors, peak_bytes, release_unused, reset_peak
from minimind.training.metrics import MetricsLog
from minimind.training.objectives import Objective
from minimind.training.precision import Precision
from minimind.training.reporter import Reporter, pluralize
from minimind.training.run import has_begun
from minimind.training.schedule import lr_fraction
from minimind.training.sums import LossSums

_MAX_SKIPPED = 3  # steps with bad numbers in a row before the run halts
_T = TypeVar("_T")


@dataclass
class TrainingResult:
    """How training ended. `elapsed_s` counts training alone, over all resumptions."""

    steps: int
    num_steps: int
    elapsed_s: float
    tokens: int
    first: dict[str, float]  # the validation before the first step, if there was one
    validation: dict[str, float]
    best: dict[str, Any]  # "step" of the best validation and its "metric" and "value"
    finished: bool


@dataclass
class _Progress:
    """What a checkpoint remembers beside tensors; the interval is that since the last log line."""

    step: int = 0
    elapsed_s: float = 0.0
    tokens: int = 0  # read in training, without padding
    interval: LossSums = field(default_factory=LossSums)  # of the steps that were not skipped
    interval_tokens: int = 0
    interval_s: float = 0.0
    data_s: float = 0.0  # spent waiting for batches
    grad_norms: list[float] = field(default_factory=list)
    skipped: int = 0  # steps with bad numbers, in a row
    first: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    validated: int = 0  # the step that `validation` is of
    best: dict[str, Any] = field(default_factory=dict)  # "step", "metric", "value"


@dataclass(frozen=True)
class EvalSet:
    """Held-out windows, and the objective that measures them."""

    objective: Objective
    mixes: list[MixedDataset]


@dataclass
class Trainer:
    """What a run consists of; `train` runs it."""

    model: Transformer
    objective: Objective
    data: MixedDataset
    held_out: MixedDataset | None
    recipe: Recipe
    run: Path
    num_steps: int
    micro_batch: int
    device: torch.device
    precision: Precision
    reporter: Reporter
    write_samples: Callable[[], list[dict[str, str]]] = list  # {"prompt", "text"} each validation
    data_sha256: str = ""  # of what the windows are made from
    base_sha256: str = ""  # of the weights that are not trained, which no checkpoint holds
    retention: EvalSet | None = None  # what the run may forget while it learns something else
    validate_first: bool = False  # before the first step too
    workers: ProcessGroup = SINGLE_PROCESS  # the processes that share the work
    max_eval_batch: int = 8  # windows at once in a validation; halved where memory is too small

    @property
    def eval_batch(self) -> int:
        """Windows at once in a validation: no more than fit where gradients are computed."""
        return min(self.max_eval_batch, self.micro_batch)


def train(job: Trainer) -> TrainingResult:
    """Train `job.model` in place, going on from the run's newest valid checkpoint.

    The data cursor is one integer, step * batch. The gradient of a step is the sum of all losses
    over the number of losses, however the batch is split into processes and micro-batches. All
    processes validate; the first one alone logs and saves, and the others wait for it.
    Raises TrainingError when the numbers go bad, or when a batch has nothing to learn.
    """
    recipe, workers = job.recipe, job.workers
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(_metrics_log(job)))
        stack.callback(job.reporter.stop)
        model = job.model
        if recipe.training.compile:
            model = cast(Transformer, torch.compile(job.model))
        engine = _engine(job, model)
        asked = stack.enter_context(_stop_requests())

        def stop_requested() -> bool:
            return workers.any_rank(asked())

        at = _resume(job, engine, log)
        log.start_trackers(at.step)
        reset_peak(job.device)
        writer = CheckpointWriter(job.run, keep=recipe.checkpoint.keep)
        saving = _Saving(job, engine, log, stack.enter_context(writer), at.step)
        if at.step == 0 and job.validate_first:
            at.first = _validated(job, engine, model, log, at.step, asked) or {}
        job.reporter.start("training", job.num_steps, at.step)
        _between_steps(job, model, log, saving, at, asked)
        batches = stack.enter_context(contextlib.closing(Prefetcher(job.data)))
        while at.step < job.num_steps and not stop_requested():
            clock, random = time.perf_counter(), _random_states(job.device)
            engine.set_lr(lr_fraction(at.step, job.num_steps, recipe.schedule))
            sums = _accumulate(job, engine, batches, at, stop_requested)
            if stop_requested():  # a step may take minutes: the run that goes on does it again
                _set_random_states(random, job.device)
                break
            if sums is None:
                take_fewer(job, f"step {at.step + 1}")
                _set_random_states(random, job.device)
                continue
            sums.over(workers, job.device)
            _step(job, engine, log, at, sums)
            seconds = time.perf_counter() - clock
            at.interval_s += seconds
            at.elapsed_s += seconds
            if at.step % recipe.training.log_every == 0 or at.step == job.num_steps:
                _log(job, log, engine, at)
            _between_steps(job, model, log, saving, at, asked)
        if at.step > saving.saved:
            saving.save(at)
    finished = at.step == job.num_steps and not _validation_is_due(job, at)
    return TrainingResult(
        at.step, job.num_steps, at.elapsed_s, at.tokens, at.first, at.validation, at.best, finished
    )


def _metrics_log(job: Trainer) -> MetricsLog:
    """Open the log of the run; processes other than the first one write into nothing."""
    first = job.workers.is_main
    return MetricsLog(
        job.run / "metrics.jsonl" if first else Path(os.devnull),
        trackers=job.recipe.training.trackers if first else (),
        name=job.run.name,
        warn=job.reporter.say,
    )


def _parts(job: Trainer, step: int) -> list[tuple[int, int]]:
    """(first sample, number of samples) of each micro-batch of this process; none after the run."""
    batch = job.recipe.training.global_batch_size
    share = job.workers.shard(step * batch, batch) if step < job.num_steps else range(0)
    return [(sample, job.micro_batch) for sample in share[:: job.micro_batch]]


def _accumulate(
    job: Trainer,
    engine: Backend,
    batches: Prefetcher,
    at: _Progress,
    stop_requested: Callable[[], bool],
) -> LossSums | None:
    """Losses and gradients of this process's share of a step, as far as no stop is asked for.

    None when memory ran out in a process: then nothing of the step is left, and fewer windows at
    once are to be tried.
    """
    # A fixed divisor keeps fp16 in range; the true one is known after the last part.
    factor = job.precision.scaler.scale / _tokens_per_step(job)
    sums, short, parts = LossSums(), False, _parts(job, at.step)
    following = [*parts[1:], *_parts(job, at.step + 1)[:1]]
    for part, after in itertools.zip_longest(parts, following):
        if stop_requested():
            return sums
        if short:  # the others have not heard of it yet
            continue
        try:
            waiting = time.perf_counter()
            sequences = to_device(batches.batch(part, after), job.device)
            at.data_s += time.perf_counter() - waiting
            loss, count, more = engine.loss(sequences)
            engine.backward(loss * factor)
            sums.add(LossSums(loss.detach(), count, more, sequences.num_tokens))
        except (RuntimeError, MemoryError) as error:
            if not _is_short_of_memory(error) or not engine.discard():
                raise
            short = True
    if not job.workers.any_rank(short):
        return sums
    engine.discard()
    return None


def _tokens_per_step(job: Trainer) -> int:
    return job.recipe.training.global_batch_size * job.recipe.data.seq_len


def _is_short_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or is_out_of_memory(error)


def take_fewer(job: Trainer, where: str) -> None:
    """Half as many windows at once, or the next number that divides a process's share.

    Only here is what filled the memory out of reach: an error that is being handled holds on to
    the frames that it passed, and they to all that they computed.
    """
    release_unused(job.device)
    share = job.recipe.training.global_batch_size // job.workers.size
    fewer = next((n for n in divisors(share) if n <= job.micro_batch // 2), None)
    sequences = pluralize(job.micro_batch, "window")
    where = f"{where}: too little memory on {job.device} for {sequences}"
    if fewer is None:
        raise ResourceError(f"{job.run}: {where}; {_memory_advice(job)}")
    job.reporter.say(f"{where} at once; going on with {fewer}, the batch in more parts")
    job.micro_batch = fewer


def _memory_advice(job: Trainer, *, training: bool = True) -> str:
    """Return what helps when a single sequence does not fit and the same run accepts."""
    ways = []
    if training and not job.recipe.training.activation_checkpointing:
        ways.append("set training.activation_checkpointing=true")
    if not has_begun(job.run):  # a run that has begun keeps its model and its sequence length
        ways.append("take a smaller model or a shorter data.seq_len")
    return ", ".join(
        [*ways, "or free memory on the device" if ways else "free memory on the device"]
    )


def fits_in_memory(workers: ProcessGroup, work: Callable[[], None]) -> bool:
    """Do `work` in every process; return False, in all of them, if memory ran out in one."""
    short = False
    try:
        work()
    except (RuntimeError, MemoryError) as error:
        if not _is_short_of_memory(error):
            raise
        short = True
    return not workers.any_rank(short)


def evaluated(
    job: Trainer, workers: ProcessGroup, count: int, work: Callable[[int, int], _T]
) -> Iterator[_T | None]:
    """Yield `work(first sample, number)` for each micro-batch of this process's part of `count`.

    All processes yield equally often, None where no sample is left. Where memory runs out in one
    of them, all take half as many windows at once. Raises ResourceError when one does not fit.
    """
    share = -(-count // workers.size)
    start = workers.rank * share
    end = min(start + share, count)
    done = 0
    while done < share:
        size, result = job.eval_batch, None
        number = min(size, end - start - done)

        def attempt(start: int = start + done, number: int = number) -> None:
            nonlocal result
            result = work(start, number) if number > 0 else None

        if fits_in_memory(workers, attempt):
            yield result
            done += size
            continue
        result = None
        release_unused(job.device)
        where = f"too little memory on {job.device} to evaluate {pluralize(size, 'window')} at once"
        if size == 1:
            advice = _memory_advice(job, training=False)
            raise ResourceError(f"{job.run}: {where}, which is the least; {advice}")
        job.max_eval_batch = size // 2
        job.reporter.say(f"{where}; {pluralize(size // 2, 'window')} from now on")


def _between_steps(
    job: Trainer,
    model: Transformer,
    log: MetricsLog,
    saving: "_Saving",
    at: _Progress,
    asked: Callable[[], bool],
) -> None:
    """Validate and save, each when it is due.

    A stop in the middle of a validation leaves it due, for the run that goes on: `asked` says
    whether this process is to stop.
    """
    better = False
    if _validation_is_due(job, at):
        saving.engine.gather_weights()
        metrics = _validated(job, saving.engine, model, log, at.step, asked)
        if metrics is None:
            return
        at.validation, at.validated = metrics, at.step
        if better := _is_better(metrics, at.best):
            name = selection_metric(metrics)
            at.best = {"step": at.step, "metric": name, "value": metrics[name]}
    settings = job.recipe.checkpoint
    ends = (job.num_steps, stable_steps(job.num_steps, job.recipe.schedule))
    due = at.step % settings.every == 0 or at.step in ends
    if at.step > saving.saved and (due or (better and settings.keep_best)):
        saving.save(at)
    saving.writer.check()


def _validation_is_due(job: Trainer, at: _Progress) -> bool:
    due = at.step % job.recipe.validation.every == 0 or at.step == job.num_steps
    return due and at.validated < at.step


def selection_metric(metrics: dict[str, float]) -> str:
    """Name of the figure by which validations are compared: the lowest is the best."""
    return "bits_per_byte" if "bits_per_byte" in metrics else "loss"


def _is_better(metrics: dict[str, float], best: dict[str, Any]) -> bool:
    if not metrics:
        return False
    value = metrics[selection_metric(metrics)]
    return math.isfinite(value) and (not best or value < best["value"])


def _log(job: Trainer, log: MetricsLog, engine: Backend, at: _Progress) -> None:
    """Log a line of metrics and draw the progress bar.

    Loss, `grad_norm` and what the objective measures are means over the steps since the last line
    that were not skipped, `grad_norm_max` is the largest of these norms; null if all were skipped.
    """
    rate = at.interval_tokens / at.interval_s
    learned, norms = int(at.interval.count), at.grad_norms
    metrics = at.interval.metrics(job.objective) if learned else {"loss": math.nan}
    log.write(
        {"kind": "train", "step": at.step, "tokens": at.tokens, "num_label_tokens": learned}
        | {"grad_norm": fmean(norms) if norms else None, "grad_norm_max": max(norms, default=None)}
        | metrics
        | {f"lr/{name}": lr for name, lr in engine.lrs().items()},
        timing={"elapsed_s": at.elapsed_s, "tokens_per_second": rate}
        | {"data_share": at.data_s / at.interval_s}
        | {"peak_memory_bytes": peak_bytes(job.device)},
    )
    note = job.objective.note(metrics) if learned else "skipped"
    job.reporter.progress(at.step, job.num_steps, f"{note} {rate / 1000:,.1f}k tokens/s")
    # The first line holds the first step, before which nothing has changed.
    judged = learned and at.step > job.recipe.training.log_every
    if judged and (warning := job.objective.warning(at.step / job.num_steps, metrics)):
        job.reporter.say(warning)
    at.interval, at.grad_norms = LossSums(), []
    at.interval_tokens, at.interval_s, at.data_s = 0, 0.0, 0.0


def _engine(job: Trainer, compiled: Transformer) -> Backend:
    settings = job.recipe.training
    if settings.backend == "deepspeed":
        from minimind.training.deepspeed_backend import (
            DeepSpeedBackend,  # slow to import, and need not be there
        )

        return DeepSpeedBackend(job.model, job.recipe, job.objective, job.precision, job.workers)
    return TorchBackend(
        job.model, compiled, job.recipe.optim, job.objective, job.precision, job.workers
    )


def _step(job: Trainer, engine: Backend, log: MetricsLog, at: _Progress, sums: LossSums) -> None:
    """Take an optimizer step with the gradient of `sums`, or skip it if that is not finite.

    Raises TrainingError when there is nothing to learn, or after several bad steps in a row.
    """
    scaler, count = job.precision.scaler, int(sums.count)
    if not count:
        raise TrainingError(
            f"{job.run}: a whole batch has nothing to learn: no answer is left in its windows. "
            "Is data.seq_len too short, or are the answers empty? `minimind data inspect` shows"
        )
    norm = engine.step(_tokens_per_step(job) / count / scaler.scale)
    finite = math.isfinite(norm)
    scaler.update(finite)
    at.step += 1
    at.tokens += int(sums.tokens)
    at.interval_tokens += int(sums.tokens)
    if finite:
        at.skipped = 0
        at.interval.add(sums)
        at.grad_norms.append(norm)
    else:
        at.skipped += 1
        _report_skipped(job, log, at)


def _report_skipped(job: Trainer, log: MetricsLog, at: _Progress) -> None:
    """Write a skipped step's samples down and report it; too many in a row halt the run.

    Not reported, and no reason to halt, is an overflow of fp16 that a lower loss scale may cure.
    """
    batch, scaler = job.recipe.training.global_batch_size, job.precision.scaler
    samples = range((at.step - 1) * batch, at.step * batch)
    line = {"kind": "skipped", "step": at.step, "samples": list(samples)}
    log.write(line | ({"loss_scale": scaler.scale} if scaler.enabled else {}))
    if scaler.scale > 1.0:
        return
    where = f"step {at.step} (samples {samples[0]}-{samples[-1]})"
    job.reporter.say(f"{where}: the gradient is not finite; nothing was changed by it")
    if at.skipped >= _MAX_SKIPPED:
        raise TrainingError(
            f"{job.run}: {at.skipped} steps in a row gave numbers that are not finite, up to "
            f"{where}. Try a lower optim.lr and optim.muon_lr, or training.precision=fp32"
        )


def _validated(
    job: Trainer,
    engine: Backend,
    model: Transformer,
    log: MetricsLog,
    step: int,
    asked: Callable[[], bool],
) -> dict[str, float] | None:
    """Validate in every process that has the weights, let the first one write, and log both.

    Nothing, {}, if nothing is held out; None, and nothing logged, when `asked` says in one of these
    processes that it is to stop.
    """
    first = job.workers.is_main
    workers = job.workers if engine.replicates else SINGLE_PROCESS
    metrics: dict[str, float] | None = None
    if first or engine.replicates:
        metrics = validate(job, model, lambda: workers.any_rank(asked()), workers)
    if metrics and first:
        written = job.write_samples()
        if asked():
            metrics = None
        else:
            log.write({"kind": "validation", "step": step} | metrics)
            for sample in written:
                log.write({"kind": "sample", "step": step} | sample)
    told: dict[str, float] | None = job.workers.broadcast_object(metrics)
    return told


def validate(
    job: Trainer,
    model: Transformer,
    stop_requested: Callable[[], bool] = lambda: False,
    workers: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, float] | None:
    """Metrics on held-out sequences, `validation.num_sequences` of each kind; None after a stop.

    Those of the general set are called `retention_…`. Each of `workers` reads its part of the
    windows, and all get the same figures.
    """
    sets = [("", EvalSet(job.objective, [job.held_out]))] if job.held_out else []
    sets += [("retention_", job.retention)] if job.retention else []
    metrics: dict[str, float] = {}
    stopped = False
    model.eval()
    for prefix, measured in sets:
        sums = _measure(job, model, measured, stop_requested, workers)
        if stopped := sums is None:
            break
        own = sums.metrics(measured.objective)
        metrics |= {f"{prefix}{name}": value for name, value in own.items()}
    model.train()
    return None if stopped else metrics


@torch.no_grad()
def _measure(
    job: Trainer,
    model: Transformer,
    measured: EvalSet,
    stop_requested: Callable[[], bool],
    workers: ProcessGroup,
) -> LossSums | None:
    sums = LossSums()
    for mix in measured.mixes:

        def losses(start: int, number: int, mix: MixedDataset = mix) -> LossSums:
            sequences = to_device(mix.batch(start, number), job.device)
            with job.precision.autocast():
                return LossSums(*measured.objective.loss(model, sequences))

        count = min(job.recipe.validation.num_sequences, mix.order.epoch_size)
        for part in evaluated(job, workers, count, losses):
            if stop_requested():
                return None
            if part:
                sums.add(part)
    sums.complete(workers, job.device)
    sums.over(workers, job.device)
    return sums


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"rng/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng/cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["rng/mps"] = torch.mps.get_rng_state()
    return states


def _all_random_states(job: Trainer) -> dict[str, Tensor]:
    """[processes, bytes] of each kind."""
    own = _random_states(job.device)
    return {name: torch.stack(job.workers.all_gather(state)) for name, state in own.items()}


def _set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    if "rng/cpu" in states:
        torch.set_rng_state(states["rng/cpu"])
    if "rng/cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["rng/cuda"], device)
    if "rng/mps" in states and device.type == "mps":
        torch.mps.set_rng_state(states["rng/mps"])


def _frozen(model: Transformer) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@dataclass
class _Saving:
    """What a checkpoint is made of, who writes it, and the step of the latest one."""

    job: Trainer
    engine: Backend
    log: MetricsLog
    writer: CheckpointWriter
    saved: int

    def save(self, at: _Progress) -> None:
        """Save all but the weights that are not trained: those are the base model's."""
        self.saved, job, frozen = at.step, self.job, _frozen(self.job.model)
        recipe = job.recipe
        self.engine.gather_weights()
        optimizer = self.engine.state_tensors() | _all_random_states(job)
        if not job.workers.is_main:
            return
        self.writer.save(
            at.step,
            model={name: t for name, t in job.model.state_dict().items() if name not in frozen},
            optimizer=optimizer,
            state=vars(at)
            | {"interval": at.interval.state()}
            | {"metrics_offset": self.log.offset, "scaler": job.precision.scaler.state()}
            | {"micro_batch": job.micro_batch, "processes": job.workers.size}
            | {"data_sha256": job.data_sha256, "base_sha256": job.base_sha256}
            | {"num_steps": job.num_steps, "config": job.model.config.model_dump()},
            best=at.best.get("step") if recipe.checkpoint.keep_best else None,
            protect=[stable] if (stable := stable_steps(job.num_steps, recipe.schedule)) else [],
            before_write=self.log.sync,
        )


def _resume(job: Trainer, engine: Backend, log: MetricsLog) -> _Progress:
    """Begin where the newest valid checkpoint stood, if there is one.

    The first process reads it and the others learn it from there, so that it need not be on a
    disk that all machines share.
    """
    job.model.train()
    workers = job.workers
    if workers.rank:  # dropout is to draw other numbers in each process
        torch.manual_seed(job.recipe.seed + workers.rank)
    at, random = _load(job, engine, log) if workers.is_main else (_Progress(), {})
    if workers.size > 1:
        state = vars(at) | {"interval": at.interval.state()}
        processes = {name: len(states) for name, states in random.items()}
        state, job.micro_batch, scaler, processes = workers.broadcast_object(
            [state, job.micro_batch, job.precision.scaler.state(), processes]
        )
        at = _Progress(**state | {"interval": LossSums.load(state["interval"], job.device)})
        job.precision.scaler.load(scaler)
        for name, own in _random_states(job.device).items():
            if name in processes:
                random.setdefault(name, torch.empty((processes[name], *own.shape), dtype=own.dtype))
                workers.broadcast_([random[name]])
    engine.begin()
    # A process more than there were then goes on with the seed of its own.
    rank = workers.rank  # a state of its own: torch crashes on a part of a larger tensor
    mine = {name: states[rank].clone() for name, states in random.items() if rank < len(states)}
    _set_random_states(mine, job.device)
    return at


def _load(job: Trainer, engine: Backend, log: MetricsLog) -> tuple[_Progress, dict[str, Tensor]]:
    """Load the newest valid checkpoint, if there is one: where it stood, and random states."""
    checkpoint = latest_checkpoint(job.run, warn=job.reporter.say)
    if checkpoint is None:
        log.truncate(0)
        return _Progress(), {}
    state = dict(checkpoint.state)
    if state.pop("data_sha256") != job.data_sha256:
        raise CheckpointError(
            f"{job.run}: the data or the tokenizer is not the one that this run began with. "
            "Put it back, choose another --out, or start over with --fresh"
        )
    for checked in ("base_sha256", "config"):  # when the model was built
        state.pop(checked, None)
    restore_weights(job.model, checkpoint)
    random = checkpoint.optimizer.select(lambda name: name.startswith("rng/"))
    try:
        engine.load_state_tensors(checkpoint.optimizer.select(lambda name: name not in random))
    except CheckpointError as error:
        raise CheckpointError(
            f"{checkpoint.path}: {error}; choose another --out, or start over with --fresh"
        ) from error
    job.precision.scaler.load(state.pop("scaler"))
    log.truncate(state.pop("metrics_offset"))
    if (planned := state.pop("num_steps", job.num_steps)) != job.num_steps:
        steps = {"from_steps": planned, "to_steps": job.num_steps}
        log.write({"kind": "extended", "step": checkpoint.step} | steps)
    micro_batch, processes = state.pop("micro_batch"), state.pop("processes", 1)
    if processes == job.workers.size:  # another split of a batch rounds differently
        job.micro_batch = min(job.micro_batch, micro_batch)
    job.reporter.say(f"going on from step {checkpoint.step:,} ({checkpoint.path.name})")
    at = _Progress(**state | {"interval": LossSums.load(state["interval"], job.device)})
    return at, {name: states.view(processes, -1) for name, states in random.items()}


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask the loop to save and leave; a second one leaves at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs us there handles signals
        before = {}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
