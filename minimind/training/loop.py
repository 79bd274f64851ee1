"""The one training loop: every stage is this loop with another objective."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor

from minimind.config.settings import Recipe
from minimind.data.packing import Mix
from minimind.errors import CheckpointError, ResourceError, TrainingError, is_out_of_memory
from minimind.model import Transformer
from minimind.training.batch import to_device
from minimind.training.checkpoint import CheckpointWriter, latest_checkpoint, restore_weights
from minimind.training.distributed import ALONE, Workers
from minimind.training.engine import Engine, TorchEngine
from minimind.training.memory import divisors, forget_peak, peak_bytes, release
from minimind.training.metrics import MetricsLog
from minimind.training.objectives import Objective
from minimind.training.precision import Precision
from minimind.training.prolong import stable_steps
from minimind.training.reporter import Reporter, counted
from minimind.training.schedule import lr_fraction

_MAX_SKIPPED = 3  # steps with bad numbers in a row before the run halts
VALIDATION_WINDOWS = 8  # at once


@dataclass
class Outcome:
    """How training ended. `elapsed_s` counts training alone, over all resumptions."""

    steps: int
    num_steps: int
    elapsed_s: float
    tokens: int
    first: dict[str, float]  # the validation before the first step, if there was one
    validation: dict[str, float]
    best: dict[str, Any]  # "step" of the best validation and its "figure" and "value"
    finished: bool


@dataclass
class Sums:
    """Losses, their number, and what else an objective adds up; kept on the device until read."""

    loss: Tensor | float = 0.0
    count: Tensor | int = 0
    more: dict[str, Tensor] = field(default_factory=dict)

    def add(self, other: "Sums") -> None:
        self.loss = self.loss + other.loss
        self.count = self.count + other.count
        self.more = {key: self.more.get(key, 0) + value for key, value in other.more.items()}

    def over(self, workers: Workers, device: torch.device) -> None:
        """Add up those of all processes. Double precision holds every number exactly."""
        if workers.size == 1:
            return
        parts = [torch.as_tensor(part) for part in (self.loss, self.count, *self.more.values())]
        sizes = [part.numel() for part in parts]
        flat = torch.cat([part.to(device, torch.float64).flatten() for part in parts])
        workers.sum([flat])
        totals = [
            total.view(part.shape).to(part.dtype)
            for part, total in zip(parts, flat.split(sizes), strict=True)
        ]
        self.loss, self.count = totals[:2]
        self.more = dict(zip(self.more, totals[2:], strict=True))

    def state(self) -> dict[str, Any]:
        """As JSON; single precision survives the way through Python's doubles exactly."""
        more = {key: value.tolist() for key, value in self.more.items()}
        return {"loss": float(self.loss), "count": int(self.count), "more": more}

    @classmethod
    def load(cls, state: dict[str, Any], device: torch.device) -> "Sums":
        more = {key: torch.tensor(value, device=device) for key, value in state["more"].items()}
        loss = torch.tensor(state["loss"], device=device)
        return cls(loss, torch.tensor(state["count"], device=device), more)

    def figures(self, objective: Objective) -> dict[str, float]:
        mean = float(self.loss) / max(int(self.count), 1)
        return objective.figures(mean, {key: value.tolist() for key, value in self.more.items()})


@dataclass
class _Progress:
    """What a checkpoint remembers beside tensors; the interval is that since the last log line."""

    step: int = 0
    elapsed_s: float = 0.0
    interval: Sums = field(default_factory=Sums)
    interval_s: float = 0.0
    interval_steps: int = 0
    data_s: float = 0.0
    skipped: int = 0  # steps with bad numbers, in a row
    first: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    validated: int = 0  # the step that `validation` is of
    best: dict[str, Any] = field(default_factory=dict)  # "step", "figure", "value"


@dataclass(frozen=True)
class Measured:
    """Held-out windows, and the objective that measures them."""

    objective: Objective
    mixes: list[Mix]


@dataclass
class Trainer:
    """What a run consists of; `train` runs it."""

    model: Transformer
    objective: Objective
    data: Mix
    held_out: Mix | None
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
    general: Measured | None = None  # what the run may forget while it learns something else
    validate_first: bool = False  # before the first step too
    workers: Workers = ALONE  # the processes that share the work


def train(job: Trainer) -> Outcome:
    """Train `job.model` in place, going on from the run's newest valid checkpoint.

    The data cursor is one integer, step * batch. The gradient of a step is the sum of all losses
    over the number of losses, however the batch is split into processes and micro-batches. The
    first process alone validates, logs and saves; the others wait for it before the next step.
    Raises TrainingError when the numbers go bad, or when a batch has nothing to learn.
    """
    recipe, batch = job.recipe, job.recipe.training.batch
    workers = job.workers
    log = MetricsLog(
        job.run / "metrics.jsonl" if workers.is_first else Path(os.devnull),
        trackers=recipe.training.trackers if workers.is_first else (),
        name=job.run.name,
    )
    model = job.model
    if recipe.training.compile:
        model = cast(Transformer, torch.compile(job.model))
    engine = _engine(job, model)
    tokens_a_step = batch * recipe.data.window
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(log))
        stack.callback(job.reporter.stop)
        asked = stack.enter_context(_stop_requests())

        def stop_requested() -> bool:
            return workers.any(asked())

        at = _resume(job, engine, log)
        forget_peak(job.device)
        writer = CheckpointWriter(job.run, keep=recipe.checkpoint.keep)
        saving = _Saving(job, engine, log, stack.enter_context(writer), at.step)
        if at.step == 0 and job.validate_first and workers.is_first:
            at.first = _validated(job, model, log, at.step, asked) or {}
        job.reporter.start("training", job.num_steps, at.step)
        _between_steps(job, model, log, saving, at, asked)
        while at.step < job.num_steps and not stop_requested():
            clock, random = time.perf_counter(), _random_states(job.device)
            engine.set_lr(lr_fraction(at.step, job.num_steps, recipe.schedule))
            sums = _accumulate(job, engine, at, stop_requested)
            if stop_requested():  # a step may take minutes: the run that goes on does it again
                _set_random_states(random, job.device)
                break
            if sums is None:
                _take_fewer(job, at)
                _set_random_states(random, job.device)
                continue
            sums.over(workers, job.device)
            norm = _step(job, engine, int(sums.count), tokens_a_step)
            at.interval.add(sums)
            at.step += 1
            at.skipped = 0 if norm is not None else at.skipped + 1
            if at.skipped:
                _complain(job, log, at)
            seconds = time.perf_counter() - clock
            at.interval_s += seconds
            at.interval_steps += 1
            at.elapsed_s += seconds
            if at.step % recipe.training.log_every == 0 or at.step == job.num_steps:
                _log(job, log, engine, at, norm)
            _between_steps(job, model, log, saving, at, asked)
        if at.step > saving.saved:
            saving.save(at)
    finished = at.step == job.num_steps and not _validation_is_due(job, at)
    tokens = at.step * tokens_a_step
    return Outcome(
        at.step, job.num_steps, at.elapsed_s, tokens, at.first, at.validation, at.best, finished
    )


def _accumulate(
    job: Trainer, engine: Engine, at: _Progress, stop_requested: Callable[[], bool]
) -> Sums | None:
    """Losses and gradients of this process's share of a step, as far as no stop is asked for.

    None when memory ran out in a process: then nothing of the step is left, and fewer windows at
    once are to be tried.
    """
    batch = job.recipe.training.batch
    # A fixed divisor keeps fp16 in range; the true one is known after the last part.
    factor = job.precision.scaler.scale / (batch * job.recipe.data.window)
    sums, short = Sums(), False
    for sample in job.workers.share(at.step * batch, batch)[:: job.micro_batch]:
        if stop_requested():
            return sums
        if short:  # the others have not heard of it yet
            continue
        waiting = time.perf_counter()
        windows = to_device(job.data.batch(sample, job.micro_batch), job.device)
        at.data_s += time.perf_counter() - waiting
        try:
            loss, count, more = engine.loss(windows)
            engine.backward(loss * factor)
            sums.add(Sums(loss.detach(), count, more))
        except (RuntimeError, MemoryError) as error:
            if not (is_out_of_memory(error) or isinstance(error, MemoryError)):
                raise
            if not engine.discard():
                raise
            short = True
    if not job.workers.any(short):
        return sums
    engine.discard()
    return None


def _take_fewer(job: Trainer, at: _Progress) -> None:
    """Half as many windows at once, or the next number that divides a process's share.

    Only here is what filled the memory out of reach: an error that is being handled holds on to
    the frames that it passed, and they to all that they computed.
    """
    release(job.device)
    share = job.recipe.training.batch // job.workers.size
    fewer = next((n for n in divisors(share) if n <= job.micro_batch // 2), None)
    windows = counted(job.micro_batch, "window")
    where = f"step {at.step + 1}: too little memory on {job.device} for {windows}"
    if fewer is None:
        advice = "a smaller model or a shorter data.window"
        if not job.recipe.training.activation_checkpointing:
            advice = f"training.activation_checkpointing=true, {advice}"
        raise ResourceError(f"{job.run}: {where} at once, and fewer there are not; take {advice}")
    job.reporter.say(f"{where} at once; going on with {fewer}, the batch in more parts")
    job.micro_batch = fewer


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
        first = job.workers.is_first
        figures = _validated(job, model, log, at.step, asked) if first else None
        figures = job.workers.tell(figures)
        if figures is None:
            return
        at.validation, at.validated = figures, at.step
        if better := _is_better(figures, at.best):
            name = judged_by(figures)
            at.best = {"step": at.step, "figure": name, "value": figures[name]}
    settings = job.recipe.checkpoint
    ends = (job.num_steps, stable_steps(job.num_steps, job.recipe.schedule))
    due = at.step % settings.every == 0 or at.step in ends
    if at.step > saving.saved and (due or (better and settings.keep_best)):
        saving.save(at)
    saving.writer.check()


def _validation_is_due(job: Trainer, at: _Progress) -> bool:
    due = at.step % job.recipe.validation.every == 0 or at.step == job.num_steps
    return due and at.validated < at.step


def judged_by(figures: dict[str, float]) -> str:
    """Name of the figure by which validations are compared: the lowest is the best."""
    return "bits_per_byte" if "bits_per_byte" in figures else "loss"


def _is_better(figures: dict[str, float], best: dict[str, Any]) -> bool:
    if not figures:
        return False
    value = figures[judged_by(figures)]
    return math.isfinite(value) and (not best or value < best["value"])


def _log(job: Trainer, log: MetricsLog, engine: Engine, at: _Progress, norm: float | None) -> None:
    """One line of metrics on the steps since the last one, and the progress bar."""
    tokens_a_step = job.recipe.training.batch * job.recipe.data.window
    rate = at.interval_steps * tokens_a_step / at.interval_s
    figures = at.interval.figures(job.objective)
    log.write(
        {"kind": "train", "step": at.step, "tokens": at.step * tokens_a_step}
        | {"learned": int(at.interval.count), "grad_norm": norm}
        | figures
        | {f"lr/{name}": lr for name, lr in engine.lrs().items()},
        timing={"elapsed_s": at.elapsed_s, "tokens_per_second": rate}
        | {"data_share": at.data_s / at.interval_s}
        | {"peak_memory_bytes": peak_bytes(job.device)},
    )
    note = f"{job.objective.note(figures)} {rate / 1000:,.1f}k tokens/s"
    job.reporter.progress(at.step, job.num_steps, note)
    has_first_step = at.step == at.interval_steps  # whose loss is that of no training
    if not has_first_step and (warning := job.objective.warning(at.step / job.num_steps, figures)):
        job.reporter.say(warning)
    at.interval, at.interval_s, at.interval_steps, at.data_s = Sums(), 0.0, 0, 0.0


def _engine(job: Trainer, compiled: Transformer) -> Engine:
    settings = job.recipe.training
    if settings.engine == "deepspeed":
        from minimind.training.zero import ZeroEngine  # slow to import, and need not be there

        return ZeroEngine(job.model, job.recipe, job.objective, job.precision, job.workers)
    return TorchEngine(
        job.model, compiled, job.recipe.optim, job.objective, job.precision, job.workers
    )


def _step(job: Trainer, engine: Engine, count: int, divisor: int) -> float | None:
    """One optimizer step: the gradient's norm, or None if it was bad and nothing was changed."""
    if not count:
        raise TrainingError(
            f"{job.run}: a whole batch has nothing to learn: no answer is left in its windows. "
            "Is data.window too short, or are the answers empty? `minimind data inspect` shows"
        )
    norm = engine.step(divisor / count / job.precision.scaler.scale)
    job.precision.scaler.update(math.isfinite(norm))
    return norm if math.isfinite(norm) else None


def _complain(job: Trainer, log: MetricsLog, at: _Progress) -> None:
    """Report a skipped step and write its samples down; too many in a row halt the run."""
    batch = job.recipe.training.batch
    samples = range((at.step - 1) * batch, at.step * batch)
    where = f"step {at.step} (samples {samples[0]}-{samples[-1]})"
    job.reporter.say(f"{where}: the gradient is not finite; nothing was changed by it")
    log.write({"kind": "skipped", "step": at.step, "samples": list(samples)})
    # With fp16 the first steps find the loss scale: that is no sign of bad numbers.
    if at.skipped >= _MAX_SKIPPED and job.precision.scaler.scale <= 1.0:
        raise TrainingError(
            f"{job.run}: {at.skipped} steps in a row gave numbers that are not finite, up to "
            f"{where}. Try a lower optim.lr and optim.muon_lr, or training.precision=fp32"
        )


def _validated(
    job: Trainer,
    model: Transformer,
    log: MetricsLog,
    step: int,
    stop_requested: Callable[[], bool],
) -> dict[str, float] | None:
    """Validate and let the model write, and log both; nothing if nothing is held out.

    None, and nothing logged, when a stop was requested on the way.
    """
    figures = validate(job, model, stop_requested)
    written = job.write_samples() if figures and not stop_requested() else []
    if stop_requested():
        return None
    if figures:
        log.write({"kind": "validation", "step": step} | figures)
    for sample in written:
        log.write({"kind": "sample", "step": step} | sample)
    return figures


def validate(
    job: Trainer, model: Transformer, stop_requested: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Figures on held-out windows, at most `validation.windows` of each kind.

    Those of the general set are called `general_…`. A request to stop leaves the rest out.
    """
    model.eval()
    figures: dict[str, float] = {}
    if job.held_out:
        figures |= _measure(job, model, job.objective, [job.held_out], stop_requested)
    if job.general:
        general = _measure(job, model, job.general.objective, job.general.mixes, stop_requested)
        figures |= {f"general_{name}": value for name, value in general.items()}
    model.train()
    return figures


@torch.no_grad()
def _measure(
    job: Trainer,
    model: Transformer,
    objective: Objective,
    mixes: list[Mix],
    stop_requested: Callable[[], bool],
) -> dict[str, float]:
    sums = Sums()
    for mix in mixes:
        num_windows = min(job.recipe.validation.windows, mix.order.epoch_size)
        for at in range(0, num_windows, VALIDATION_WINDOWS):
            if stop_requested():
                return {}
            count = min(VALIDATION_WINDOWS, num_windows - at)
            windows = to_device(mix.batch(at, count), job.device)
            with job.precision.autocast():
                sums.add(Sums(*objective.loss(model, windows)))
    return sums.figures(objective)


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
    return {name: torch.stack(job.workers.gather(state)) for name, state in own.items()}


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
    engine: Engine
    log: MetricsLog
    writer: CheckpointWriter
    saved: int

    def save(self, at: _Progress) -> None:
        """Save all but the weights that are not trained: those are the base model's."""
        self.saved, job, frozen = at.step, self.job, _frozen(self.job.model)
        recipe = job.recipe
        self.engine.gather_weights()
        optimizer = self.engine.state_tensors() | _all_random_states(job)
        if not job.workers.is_first:
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
            first=self.log.sync,
        )


def _resume(job: Trainer, engine: Engine, log: MetricsLog) -> _Progress:
    """Begin where the newest valid checkpoint stood, if there is one.

    The first process reads it and the others learn it from there, so that it need not be on a
    disk that all machines share.
    """
    job.model.train()
    workers = job.workers
    if workers.rank:  # dropout is to draw other numbers in each process
        torch.manual_seed(job.recipe.seed + workers.rank)
    at, random = _load(job, engine, log) if workers.is_first else (_Progress(), {})
    if workers.size > 1:
        state = vars(at) | {"interval": at.interval.state()}
        processes = {name: len(states) for name, states in random.items()}
        state, job.micro_batch, scaler, processes = workers.tell(
            [state, job.micro_batch, job.precision.scaler.state(), processes]
        )
        at = _Progress(**state | {"interval": Sums.load(state["interval"], job.device)})
        job.precision.scaler.load(scaler)
        for name, own in _random_states(job.device).items():
            if name in processes:
                random.setdefault(name, torch.empty((processes[name], *own.shape), dtype=own.dtype))
                workers.spread([random[name]])
    engine.begin()
    # A process more than there were then goes on with the seed of its own.
    rank = workers.rank  # a state of its own: torch crashes on a part of a larger tensor
    mine = {name: states[rank].clone() for name, states in random.items() if rank < len(states)}
    _set_random_states(mine, job.device)
    return at


def _load(job: Trainer, engine: Engine, log: MetricsLog) -> tuple[_Progress, dict[str, Tensor]]:
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
        log.write({"kind": "prolonged", "step": checkpoint.step} | steps)
    micro_batch, processes = state.pop("micro_batch"), state.pop("processes", 1)
    if processes == job.workers.size:  # another split of a batch rounds differently
        job.micro_batch = min(job.micro_batch, micro_batch)
    job.reporter.say(f"going on from step {checkpoint.step:,} ({checkpoint.path.name})")
    at = _Progress(**state | {"interval": Sums.load(state["interval"], job.device)})
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
