"""The one training loop: every stage is this loop with another objective."""

import contextlib
import math
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
from minimind.errors import CheckpointError, TrainingError
from minimind.model import Transformer
from minimind.training.batch import to_device
from minimind.training.checkpoint import latest_checkpoint, save_checkpoint
from minimind.training.memory import forget_peak, peak_bytes
from minimind.training.metrics import MetricsLog
from minimind.training.objectives import Objective
from minimind.training.optimizers import Optimizers
from minimind.training.precision import Precision
from minimind.training.reporter import Reporter
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

    @property
    def finished(self) -> bool:
        return self.steps == self.num_steps


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
    data_s: float = 0.0
    first: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)


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


def train(job: Trainer) -> Outcome:
    """Train `job.model` in place, going on from the run's newest valid checkpoint.

    The data cursor is one integer, step * batch. The gradient of a step is the sum of all losses
    over the number of losses, however the batch is split into micro-batches.
    Raises TrainingError when the numbers go bad, or when a batch has nothing to learn.
    """
    recipe, batch = job.recipe, job.recipe.training.batch
    optimizers = Optimizers(job.model, recipe.optim)
    log = MetricsLog(
        job.run / "metrics.jsonl", trackers=recipe.training.trackers, name=job.run.name
    )
    model = job.model
    if recipe.training.compile:
        model = cast(Transformer, torch.compile(job.model))
    tokens_a_step = batch * recipe.data.window
    skipped = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(log))
        stack.callback(job.reporter.stop)
        stop_requested = stack.enter_context(_stop_requests())
        at = _resume(job, optimizers, log)
        forget_peak(job.device)
        saved = at.step
        if at.step == 0 and job.validate_first:
            at.first = _validated(job, model, log, at.step)
        job.reporter.start("training", job.num_steps, at.step)
        while at.step < job.num_steps:
            clock, random = time.perf_counter(), _random_states(job.device)
            optimizers.set_lr(lr_fraction(at.step, job.num_steps, recipe.schedule))
            sums = Sums()
            for sample in range(at.step * batch, (at.step + 1) * batch, job.micro_batch):
                if stop_requested():
                    break
                waiting = time.perf_counter()
                windows = to_device(job.data.batch(sample, job.micro_batch), job.device)
                at.data_s += time.perf_counter() - waiting
                with job.precision.autocast():
                    loss, count, more = job.objective.loss(model, windows)
                # A fixed divisor keeps fp16 in range; the true one is known after the last part.
                (loss * (job.precision.scaler.scale / tokens_a_step)).backward()
                sums.add(Sums(loss.detach(), count, more))
            if stop_requested():  # a step may take minutes: the run that goes on does it again
                _set_random_states(random, job.device)
                break
            norm = _step(job, optimizers, int(sums.count), tokens_a_step)
            at.interval.add(sums)
            at.step += 1
            skipped = 0 if norm is not None else skipped + 1
            if skipped:
                _complain(job, at.step, skipped)
            seconds = time.perf_counter() - clock
            at.interval_s += seconds
            at.elapsed_s += seconds

            last = at.step == job.num_steps
            if at.step % recipe.training.log_every == 0 or last:
                _log(job, log, optimizers, at, norm)
            if at.step % recipe.validation.every == 0 or last:
                at.validation = _validated(job, model, log, at.step)
            if at.step % recipe.checkpoint.every == 0 or last:
                _save(job, optimizers, log, at)
                saved = at.step
        if at.step > saved:
            _save(job, optimizers, log, at)
    tokens = at.step * tokens_a_step
    return Outcome(at.step, job.num_steps, at.elapsed_s, tokens, at.first, at.validation)


def _log(
    job: Trainer, log: MetricsLog, optimizers: Optimizers, at: _Progress, norm: float | None
) -> None:
    """One line of metrics on the steps since the last one, and the progress bar."""
    tokens_a_step = job.recipe.training.batch * job.recipe.data.window
    steps = (at.step - 1) % job.recipe.training.log_every + 1
    rate = steps * tokens_a_step / at.interval_s
    figures = at.interval.figures(job.objective)
    log.write(
        {"kind": "train", "step": at.step, "tokens": at.step * tokens_a_step}
        | {"learned": int(at.interval.count), "grad_norm": norm}
        | figures
        | {f"lr/{name}": lr for name, lr in optimizers.lrs().items()},
        timing={"elapsed_s": at.elapsed_s, "tokens_per_second": rate}
        | {"data_share": at.data_s / at.interval_s}
        | {"peak_memory_bytes": peak_bytes(job.device)},
    )
    note = f"{job.objective.note(figures)} {rate / 1000:,.1f}k tokens/s"
    job.reporter.progress(at.step, job.num_steps, note)
    if warning := job.objective.warning(at.step / job.num_steps, figures):
        job.reporter.say(warning)
    at.interval, at.interval_s, at.data_s = Sums(), 0.0, 0.0


def _step(job: Trainer, optimizers: Optimizers, count: int, divisor: int) -> float | None:
    """One optimizer step: the gradient's norm, or None if it was bad and nothing was changed."""
    gradients = [p.grad for p in job.model.parameters() if p.grad is not None]
    if not count:
        raise TrainingError(
            f"{job.run}: a whole batch has nothing to learn: no answer is left in its windows. "
            "Is data.window too short, or are the answers empty? `minimind data inspect` shows"
        )
    scale = divisor / count / job.precision.scaler.scale
    norm = float(torch.nn.utils.get_total_norm(gradients)) * scale
    finite = math.isfinite(norm)
    if finite:
        clip = min(1.0, job.recipe.optim.grad_clip / (norm + 1e-6))
        torch._foreach_mul_(gradients, scale * clip)
        optimizers.step()
    job.precision.scaler.update(finite)
    optimizers.zero_grad()
    return norm if finite else None


def _complain(job: Trainer, step: int, skipped: int) -> None:
    """Report a skipped step; too many in a row halt the run."""
    batch = job.recipe.training.batch
    where = f"step {step} (samples {(step - 1) * batch}-{step * batch - 1})"
    job.reporter.say(f"{where}: the gradient is not finite; nothing was changed by it")
    # With fp16 the first steps find the loss scale: that is no sign of bad numbers.
    if skipped >= _MAX_SKIPPED and job.precision.scaler.scale <= 1.0:
        raise TrainingError(
            f"{job.run}: {skipped} steps in a row gave numbers that are not finite, up to {where}. "
            "Try a lower optim.lr and optim.muon_lr, or training.precision=fp32"
        )


def _validated(job: Trainer, model: Transformer, log: MetricsLog, step: int) -> dict[str, float]:
    """Validate and let the model write, and log both; nothing if nothing is held out."""
    figures = validate(job, model)
    if figures:
        log.write({"kind": "validation", "step": step} | figures)
        for written in job.write_samples():
            log.write({"kind": "sample", "step": step} | written)
    return figures


def validate(job: Trainer, model: Transformer) -> dict[str, float]:
    """Figures on held-out windows, at most `validation.windows` of each kind.

    Those of the general set are called `general_…`.
    """
    model.eval()
    figures: dict[str, float] = {}
    if job.held_out:
        figures |= _measure(job, model, job.objective, [job.held_out])
    if job.general:
        general = _measure(job, model, job.general.objective, job.general.mixes)
        figures |= {f"general_{name}": value for name, value in general.items()}
    model.train()
    return figures


@torch.no_grad()
def _measure(
    job: Trainer, model: Transformer, objective: Objective, mixes: list[Mix]
) -> dict[str, float]:
    sums = Sums()
    for mix in mixes:
        num_windows = min(job.recipe.validation.windows, mix.order.epoch_size)
        for at in range(0, num_windows, VALIDATION_WINDOWS):
            count = min(VALIDATION_WINDOWS, num_windows - at)
            windows = to_device(mix.batch(at, count), job.device)
            with job.precision.autocast():
                sums.add(Sums(*objective.loss(model, windows)))
    return sums.figures(objective)


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"rng/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng/cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["rng/cpu"])
    if "rng/cuda" in states:
        torch.cuda.set_rng_state(states["rng/cuda"], device)


def _frozen(model: Transformer) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def _save(job: Trainer, optimizers: Optimizers, log: MetricsLog, at: _Progress) -> None:
    """Save all but the weights that are not trained: those are the base model's."""
    frozen = _frozen(job.model)
    save_checkpoint(
        job.run,
        at.step,
        model={name: t for name, t in job.model.state_dict().items() if name not in frozen},
        optimizer=optimizers.state_tensors() | _random_states(job.device),
        state=vars(at)
        | {"interval": at.interval.state()}
        | {"metrics_offset": log.offset, "scaler": job.precision.scaler.state()}
        | {"micro_batch": job.micro_batch}
        | {"data_sha256": job.data_sha256, "base_sha256": job.base_sha256},
        keep=job.recipe.checkpoint.keep,
    )


def _resume(job: Trainer, optimizers: Optimizers, log: MetricsLog) -> _Progress:
    """Load the newest valid checkpoint, if there is one, and say where it stood."""
    job.model.train()
    checkpoint = latest_checkpoint(job.run, warn=job.reporter.say)
    if checkpoint is None:
        log.truncate(0)
        return _Progress()
    state = dict(checkpoint.state)
    if state.pop("data_sha256") != job.data_sha256:
        raise CheckpointError(
            f"{job.run}: the data or the tokenizer is not the one that this run began with. "
            "Put it back, choose another --out, or start over with --fresh"
        )
    if state.pop("base_sha256", "") != job.base_sha256:
        raise CheckpointError(
            f"{job.run}: {job.recipe.model.init} is not the model that this run began with, and "
            "what it has learned fits no other. Put it back, choose another --out, or start over "
            "with --fresh"
        )
    unlike = job.model.load_state_dict(checkpoint.model, strict=False)
    assert not unlike.unexpected_keys and set(unlike.missing_keys) == _frozen(job.model)
    tensors = checkpoint.optimizer.items()
    _set_random_states({k: t for k, t in tensors if k.startswith("rng/")}, job.device)
    optimizers.load_state_tensors({k: t for k, t in tensors if not k.startswith("rng/")})
    job.precision.scaler.load(state.pop("scaler"))
    log.truncate(state.pop("metrics_offset"))
    job.micro_batch = state.pop("micro_batch")  # another split of a batch rounds differently
    job.reporter.say(f"going on from step {checkpoint.step:,} ({checkpoint.path.name})")
    return _Progress(**state | {"interval": Sums.load(state["interval"], job.device)})


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
