"""The training loop. Every stage is this loop with another objective.

Reading order: `Trainer.train`, then the methods in the order in which it calls them.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import cast

import torch
from torch import Tensor

from minimind.config.settings import Recipe
from minimind.data.packing import MixedDataset
from minimind.errors import MinimindError, TrainingError
from minimind.model import Transformer
from minimind.signals import Interrupts, count_interrupts, raise_on_second
from minimind.training.backend import Backend, create_backend
from minimind.training.batch import Prefetcher, Samples, to_device
from minimind.training.batch_sizes import BatchSizes, is_memory_error
from minimind.training.checkpoint import latest_checkpoint
from minimind.training.checkpoint_writer import CheckpointWriter
from minimind.training.distributed import SINGLE_PROCESS, ProcessGroup
from minimind.training.extend import stable_steps
from minimind.training.memory import peak_bytes, reset_peak
from minimind.training.metrics import MetricsLog
from minimind.training.objectives import Objective
from minimind.training.precision import Precision
from minimind.training.reporter import Reporter
from minimind.training.rng import gather_rng_states, rng_states, scatter_rng_states, set_rng_states
from minimind.training.saving import SavedState, check_data, restore_tensors, trained_weights
from minimind.training.schedule import lr_fraction
from minimind.training.state import TrainingResult, TrainingState
from minimind.training.sums import LossSums
from minimind.training.validation import EvalSet, evaluate, is_better, selection_metric

_MAX_CONSECUTIVE_SKIPS = 3  # steps with a non-finite gradient before the run is halted


@dataclass
class Trainer:
    """Trains a model in place, resuming from the newest valid checkpoint of the run directory.

    The data cursor is one integer, step * global batch size. The gradient of a step is the sum of
    all losses divided by their number, however the batch is split into processes and micro-batches.
    """

    model: Transformer
    objective: Objective
    data: MixedDataset
    validation_data: MixedDataset | None
    recipe: Recipe
    run: Path  # the run directory
    num_steps: int
    micro_batch_size: InitVar[int]
    device: torch.device
    precision: Precision
    reporter: Reporter
    generate_samples: Callable[[], list[dict[str, str]]] = list  # {"prompt", "text"} each
    data_sha256: str = ""  # of the training data and how it was tokenized
    base_sha256: str = ""  # of the frozen weights, which no checkpoint contains
    retention: EvalSet | None = None  # measures what fine-tuning forgets
    validate_first: bool = False  # validate before the first step too
    group: ProcessGroup = SINGLE_PROCESS

    state: TrainingState = field(default_factory=TrainingState, init=False)
    batch_sizes: BatchSizes = field(init=False)
    backend: Backend = field(init=False)
    metrics_log: MetricsLog = field(init=False)
    _compiled: Transformer = field(init=False)  # the model, or torch.compile's wrapper of it
    _prefetcher: Prefetcher = field(init=False)
    _checkpoints: CheckpointWriter = field(init=False)
    _saved_step: int = field(default=0, init=False)  # of the newest checkpoint
    _interrupts: Interrupts = field(default_factory=Interrupts, init=False)

    def __post_init__(self, micro_batch_size: int) -> None:
        training = self.recipe.training
        self.batch_sizes = BatchSizes(
            train=micro_batch_size,
            per_process=training.global_batch_size // self.group.size,
            run=self.run,
            device=self.device,
            reporter=self.reporter,
            activation_checkpointing=training.activation_checkpointing,
        )

    def train(self) -> TrainingResult:
        """Run the remaining steps: set the learning rate, accumulate, step, log, validate, save.

        All ranks train and validate; rank 0 alone logs and saves. A request to stop saves a
        checkpoint and returns early. Raises TrainingError after repeated non-finite gradients, and
        for a batch without supervised tokens.
        """
        with contextlib.ExitStack() as stack:
            self._set_up(stack)
            self.resume()
            self.metrics_log.start_trackers(self.state.step)
            reset_peak(self.device)
            self._checkpoints = stack.enter_context(
                CheckpointWriter(self.run, keep=self.recipe.checkpoint.keep)
            )
            if self.state.step == 0 and self.validate_first:
                self.state.initial_validation = self.validate() or {}
            self.reporter.start("training", self.num_steps, self.state.step)
            self._validate_and_save()
            self._prefetcher = stack.enter_context(contextlib.closing(Prefetcher(self.data)))
            while self.state.step < self.num_steps and not self.stop_requested():
                if not self.train_step():
                    continue
                if self.state.step % self.recipe.training.log_every == 0 or self._is_last_step():
                    self.log()
                self._validate_and_save()
            if self.state.step > self._saved_step:
                self.save()
        state = self.state
        return TrainingResult(
            steps=state.step,
            num_steps=self.num_steps,
            elapsed_s=state.elapsed_s,
            tokens=state.tokens,
            initial_validation=state.initial_validation,
            validation=state.validation,
            best=state.best,
            finished=self._is_last_step() and not self._validation_is_due(),
        )

    def stop_requested(self) -> bool:
        """True if any rank received a request to stop. Collective."""
        return self.group.any_rank(self._interrupts.count > 0)

    def _set_up(self, stack: contextlib.ExitStack) -> None:
        """Open the metrics log, compile the model, create the backend, and handle signals."""
        settings, is_main = self.recipe.training, self.group.is_main
        self.metrics_log = stack.enter_context(
            contextlib.closing(
                MetricsLog(
                    self.run / "metrics.jsonl" if is_main else Path(os.devnull),
                    trackers=settings.trackers if is_main else (),
                    name=self.run.name,
                    warn=self.reporter.say,
                )
            )
        )
        stack.callback(self.reporter.stop)
        self._compiled = self.model
        if settings.compile:
            self._compiled = cast(Transformer, torch.compile(self.model))
        self.backend = create_backend(
            self.model, self._compiled, self.recipe, self.objective, self.precision, self.group
        )
        self._interrupts = stack.enter_context(count_interrupts(raise_on_second))

    def _is_last_step(self) -> bool:
        return self.state.step == self.num_steps

    # One step.

    def train_step(self) -> bool:
        """Do one optimizer step; return False if it was not finished and changed nothing.

        That is so after a stop request, since a step may take minutes, and after running out of
        memory, which reduces the micro-batch size. The same step comes next in both cases, with
        the same random numbers.
        """
        start, rng = time.perf_counter(), rng_states(self.device)
        self.backend.set_lr(lr_fraction(self.state.step, self.num_steps, self.recipe.schedule))
        sums = self.accumulate_gradients()
        if self.stop_requested():
            set_rng_states(rng, self.device)
            return False
        if sums is None:
            self.batch_sizes.reduce(f"step {self.state.step + 1}")
            set_rng_states(rng, self.device)
            return False
        sums.all_reduce_(self.group, self.device)
        self.optimizer_step(sums)
        seconds = time.perf_counter() - start
        self.state.interval_s += seconds
        self.state.elapsed_s += seconds
        return True

    def accumulate_gradients(self) -> LossSums | None:
        """Run forward and backward on this rank's micro-batches, and return the sums of losses.

        Returns early when a stop is requested. Returns None, with all gradients cleared, if any
        rank ran out of memory.
        """
        # The number of losses is known only after the last micro-batch. Until then gradients are
        # divided by a constant of its size, which keeps them in the range of fp16.
        loss_scale = self.precision.scaler.scale / self._tokens_per_step()
        sums, ran_out = LossSums(), False
        micro_batches = self._micro_batches(self.state.step)
        following = [*micro_batches[1:], *self._micro_batches(self.state.step + 1)[:1], None]
        for samples, next_samples in zip(micro_batches, following, strict=False):
            if self.stop_requested():
                return sums
            if ran_out:  # the other ranks do not know yet: keep calling collectives with them
                continue
            try:
                wait_start = time.perf_counter()
                batch = to_device(self._prefetcher.batch(samples, next_samples), self.device)
                self.state.interval_data_s += time.perf_counter() - wait_start
                # --8<-- [start:micro-batch]
                output = self.backend.loss(batch)
                self.backend.backward(output.loss_sum * loss_scale)
                sums.add(LossSums.of(output, batch.num_tokens))
                # --8<-- [end:micro-batch]
            except (RuntimeError, MemoryError) as error:
                if not is_memory_error(error) or not self.backend.discard():
                    raise
                ran_out = True
        if not self.group.any_rank(ran_out):
            return sums
        self.backend.discard()
        return None

    def _micro_batches(self, step: int) -> list[Samples]:
        """Return the micro-batches of this rank's shard of a step; none after the last step."""
        global_batch = self.recipe.training.global_batch_size
        count = global_batch if step < self.num_steps else 0
        shard, size = self.group.shard(step * global_batch, count), self.batch_sizes.train
        return [(first_sample, size) for first_sample in shard[::size]]

    def _tokens_per_step(self) -> int:
        return self.recipe.training.global_batch_size * self.recipe.data.seq_len

    def optimizer_step(self, sums: LossSums) -> None:
        """Apply the accumulated gradients, averaged over the losses of all ranks.

        Skips the step if the gradient is not finite. Raises TrainingError without any losses, and
        after several skipped steps in a row.
        """
        state, scaler, count = self.state, self.precision.scaler, int(sums.count)
        if not count:
            raise TrainingError(
                f"{self.run}: step {state.step + 1} has no supervised tokens: all answers in its "
                "sequences were truncated or are empty. Raise data.seq_len, or check the data with "
                "`minimind data inspect`"
            )
        grad_norm = self.backend.step(self._tokens_per_step() / count / scaler.scale)
        is_finite = math.isfinite(grad_norm)
        scaler.update(is_finite)
        state.step += 1
        state.tokens += int(sums.num_tokens)
        state.interval_tokens += int(sums.num_tokens)
        if is_finite:
            state.consecutive_skips = 0
            state.interval.add(sums)
            state.grad_norms.append(grad_norm)
        else:
            state.consecutive_skips += 1
            self._report_skipped_step()

    def _report_skipped_step(self) -> None:
        """Log the samples of a skipped step; raise TrainingError after several in a row.

        An overflow that a lower fp16 loss scale may prevent is logged, and not reported.
        """
        batch_size, scaler = self.recipe.training.global_batch_size, self.precision.scaler
        step, skips = self.state.step, self.state.consecutive_skips
        samples = range((step - 1) * batch_size, step * batch_size)
        line = {"kind": "skipped", "step": step, "samples": list(samples)}
        self.metrics_log.write(line | ({"loss_scale": scaler.scale} if scaler.enabled else {}))
        if scaler.scale > 1.0:
            return
        where = f"step {step} (samples {samples[0]}-{samples[-1]})"
        self.reporter.say(f"{where}: non-finite gradient; step skipped")
        if skips >= _MAX_CONSECUTIVE_SKIPS:
            raise TrainingError(
                f"{self.run}: {skips} steps in a row had a non-finite gradient, up to {where}. "
                "Set training.precision=fp32, or start over (--fresh) with a lower optim.lr and "
                "optim.muon_lr"
            )

    # Between steps.

    def log(self) -> None:
        """Write a line of training metrics, and update the progress bar.

        Loss, `grad_norm` and the objective's metrics are means over the interval without skipped
        steps, and `grad_norm_max` is the largest norm; null if all steps were skipped.
        """
        state, norms = self.state, self.state.grad_norms
        tokens_per_second = state.interval_tokens / state.interval_s
        count = int(state.interval.count)
        metrics = state.interval.metrics(self.objective) if count else {"loss": math.nan}
        self.metrics_log.write(
            {"kind": "train", "step": state.step, "tokens": state.tokens}
            | {self.objective.count_name: count}
            | {"grad_norm": fmean(norms) if norms else None}
            | {"grad_norm_max": max(norms, default=None)}
            | metrics
            | {f"lr/{name}": lr for name, lr in self.backend.lrs().items()},
            timing={
                "elapsed_s": state.elapsed_s,
                "tokens_per_second": tokens_per_second,
                "data_wait_fraction": state.interval_data_s / state.interval_s,
                "peak_memory_bytes": peak_bytes(self.device),
            },
        )
        note = self.objective.note(metrics) if count else "skipped"
        note = f"{note} {tokens_per_second / 1000:,.1f}k tokens/s"
        self.reporter.progress(state.step, self.num_steps, note)
        # The first line includes step 1, whose loss is that of the initial weights.
        if count and state.step > self.recipe.training.log_every:
            warning = self.objective.warning(state.step / self.num_steps, metrics)
            if warning:
                self.reporter.say(warning)
        state.start_interval()

    def _validate_and_save(self) -> None:
        """Validate and save a checkpoint, each if it is due."""
        state, improved = self.state, False
        if self._validation_is_due():
            self.backend.gather_weights()
            metrics = self.validate()
            if metrics is None:  # stopped: the resumed run validates first
                return
            state.validation, state.validated_step = metrics, state.step
            if improved := is_better(metrics, state.best):
                name = selection_metric(metrics)
                state.best = {"step": state.step, "metric": name, "value": metrics[name]}
        settings = self.recipe.checkpoint
        milestones = (self.num_steps, stable_steps(self.num_steps, self.recipe.schedule))
        is_due = state.step % settings.every == 0 or state.step in milestones
        if state.step > self._saved_step and (is_due or (improved and settings.keep_best)):
            self.save()
        self._checkpoints.check()

    def _validation_is_due(self) -> bool:
        is_due = self.state.step % self.recipe.validation.every == 0 or self._is_last_step()
        return is_due and self.state.validated_step < self.state.step

    def validate(self) -> dict[str, float] | None:
        """Evaluate on held-out sequences, generate samples, and log both.

        Every rank that has the whole model evaluates its share. Returns {} without held-out data;
        None, with nothing logged, if a stop was requested meanwhile.
        """
        metrics = None
        if self.group.is_main or self.backend.replicates:
            metrics = self.compute_validation_metrics()
        if metrics is not None and self.group.is_main:
            samples = self._samples()
            if self._interrupts.count:
                metrics = None
            else:
                if metrics:
                    line = {"kind": "validation", "step": self.state.step}
                    self.metrics_log.write(line | metrics)
                for sample in samples:
                    self.metrics_log.write({"kind": "sample", "step": self.state.step} | sample)
        result: dict[str, float] | None = self.group.broadcast_object(metrics)
        return result

    def _samples(self) -> list[dict[str, str]]:
        """Generate samples; report an error, such as of a prompt that exceeds the context."""
        try:
            return self.generate_samples()
        except MinimindError as error:
            self.reporter.say(f"step {self.state.step}: no samples: {error}")
            return []

    def compute_validation_metrics(self) -> dict[str, float] | None:
        """Return the metrics on `validation.num_sequences` of each held-out dataset.

        Metrics on the retention set are called `retention_…`. None if a stop was requested.
        """
        group = self.group if self.backend.replicates else SINGLE_PROCESS
        eval_sets = (
            {"": EvalSet(self.objective, [self.validation_data])} if self.validation_data else {}
        )
        eval_sets |= {"retention_": self.retention} if self.retention else {}
        return evaluate(
            self._compiled,
            eval_sets,
            self.recipe.validation.num_sequences,
            sizes=self.batch_sizes,
            device=self.device,
            precision=self.precision,
            group=group,
            stop_requested=lambda: group.any_rank(self._interrupts.count > 0),
        )

    # Checkpoints.

    def save(self) -> None:
        """Save a checkpoint, in the background. `saving.py` lists what it contains."""
        self._saved_step = self.state.step
        self.backend.gather_weights()
        tensors = self.backend.state_tensors() | gather_rng_states(self.group, self.device)
        if not self.group.is_main:
            return
        stable = stable_steps(self.num_steps, self.recipe.schedule)
        saved = SavedState(
            training=self.state,
            scaler=self.precision.scaler.state_dict(),
            metrics_offset=self.metrics_log.offset,
            micro_batch_size=self.batch_sizes.train,
            num_processes=self.group.size,
            num_steps=self.num_steps,
            config=self.model.config.model_dump(),
            data_sha256=self.data_sha256,
            base_sha256=self.base_sha256,
        )
        self._checkpoints.save(
            self.state.step,
            model=trained_weights(self.model),
            optimizer=tensors,
            state=saved.to_json(),
            best=self.state.best.get("step") if self.recipe.checkpoint.keep_best else None,
            protect=[stable] if stable else [],
            before_write=self.metrics_log.sync,
        )

    def resume(self) -> None:
        """Continue from the newest valid checkpoint, if there is one.

        Rank 0 reads it and broadcasts it, so that the run directory need not be on a shared disk.
        """
        self.model.train()
        if self.group.rank:  # each rank draws its own dropout masks
            torch.manual_seed(self.recipe.seed + self.group.rank)
        rng = self._load_checkpoint() if self.group.is_main else {}
        if self.group.size > 1:
            scaler = self.precision.scaler
            state, self.batch_sizes.train, scaler_state = self.group.broadcast_object(
                [self.state.state_dict(), self.batch_sizes.train, scaler.state_dict()]
            )
            self.state = TrainingState.from_state_dict(state, self.device)
            scaler.load_state_dict(scaler_state)
        self.backend.begin()
        scatter_rng_states(rng, self.group, self.device)
        self._saved_step = self.state.step

    def _load_checkpoint(self) -> dict[str, Tensor]:
        """Restore this process from the newest valid checkpoint; return all ranks' RNG states."""
        checkpoint = latest_checkpoint(self.run, warn=self.reporter.say)
        if checkpoint is None:
            self.metrics_log.truncate(0)
            return {}
        saved = SavedState.from_json(checkpoint.state, self.device)
        check_data(self.run, saved.data_sha256, self.data_sha256)
        rng = restore_tensors(checkpoint, saved.num_processes, self.model, self.backend)
        self.precision.scaler.load_state_dict(saved.scaler)
        self.metrics_log.truncate(saved.metrics_offset)
        if saved.num_steps != self.num_steps:
            steps = {"from_steps": saved.num_steps, "to_steps": self.num_steps}
            self.metrics_log.write({"kind": "extended", "step": checkpoint.step} | steps)
        if saved.num_processes == self.group.size:  # another split of a batch rounds differently
            self.batch_sizes.train = min(self.batch_sizes.train, saved.micro_batch_size)
        self.reporter.say(f"resuming from step {checkpoint.step:,} ({checkpoint.path.name})")
        self.state = saved.training
        return rng
