"""The loop on runs in memory; rows 7 (for one process) and 11 of the reliability promises."""

import copy
import gc
import math
import os
import signal
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minimind.data.packing import IGNORED, Batch, ChatWindows, Mix
from minimind.data.store import Shard
from minimind.errors import ResourceError, TrainingError
from minimind.inference.asking import write_all
from minimind.inference.sampling import Sampling
from minimind.model import Transformer
from minimind.tokenizer import Tokenizer
from minimind.training.batch import TensorBatch, to_device
from minimind.training.loop import Trainer, train
from minimind.training.objectives import Objective
from minimind.training.precision import LossScaler, Precision
from minimind.training.reporter import Reporter
from tests.support.devices import NoDoubles
from tests.support.small_runs import (
    VOCAB,
    Told,
    chat_shard,
    files_of,
    lora_settings,
    losses,
    metrics,
    nano_trainer,
    text_shard,
)


@pytest.mark.parametrize("objective", ["pretrain", "sft", "dpo", "lora", "moe"])
def test_nothing_is_in_double_precision(tmp_path: Path, objective: str) -> None:
    """Which Apple's MPS does not have. A run on a CPU is watched, with its validations."""
    kind = {"lora": "sft", "moe": "pretrain"}.get(objective, objective)
    settings = lora_settings() if objective == "lora" else {}
    preset = "nano-moe" if objective == "moe" else "nano"
    settings |= {"training__steps": 3, "validation__every": 1, "model__preset": preset}
    job = nano_trainer(tmp_path, kind, held_out=True, **settings)
    with NoDoubles():
        assert train(job).finished


def test_it_learns(tmp_path: Path) -> None:
    for objective in ("pretrain", "sft"):
        run = tmp_path / objective
        outcome = train(nano_trainer(run, objective, held_out=True, training__steps=40))
        curve = losses(run)
        assert outcome.finished and outcome.steps == len(curve) == 40
        assert outcome.tokens == 40 * 4 * 32
        assert abs(curve[0] - math.log(VOCAB)) < 0.5
        assert curve[-1] < curve[0] - 1.0
        assert outcome.validation["loss"] < curve[0] - 1.0


@pytest.mark.numeric
@pytest.mark.parametrize("preset", ["nano", "nano-moe"])
@pytest.mark.parametrize("objective", ["pretrain", "sft", "dpo"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_size_of_a_micro_batch_does_not_matter(
    tmp_path: Path, objective: str, optimizer: str, preset: str
) -> None:
    curves = []
    for micro_batch in (1, 2, 4):
        run = tmp_path / f"{micro_batch}"
        settings: dict[str, Any] = {"training__micro_batch": micro_batch, "optim__name": optimizer}
        settings |= {"training__steps": 8, "model__preset": preset}
        train(nano_trainer(run, objective, **settings))
        curves.append(losses(run))
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


def test_each_step_takes_the_samples_of_its_place_in_the_run(tmp_path: Path) -> None:
    """Whatever the micro-batch, and whether it was interrupted or not."""

    class Recorded(Mix):
        def batch(self, start: int, count: int) -> Batch:
            seen.extend(range(start, start + count))
            return super().batch(start, count)

    for micro_batch in (1, 4):
        seen: list[int] = []
        run = tmp_path / f"{micro_batch}"
        for stop_at in (3, 7, None):
            job = nano_trainer(run, training__micro_batch=micro_batch, training__steps=10)
            job.data = Recorded(job.data.parts, [1.0], job.recipe.seed)
            job.reporter = Stopping(stop_at)
            train(job)
        assert seen == list(range(40))


def test_validation_and_samples_leave_training_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Validating every 5 or every 50 steps, writing in between or not: the same bits."""

    def written(model: Transformer) -> Callable[[], list[dict[str, str]]]:
        def write() -> list[dict[str, str]]:
            model.eval()
            [tokens] = write_all(
                model, tokenizer, [[1, 2, 3]], max_new_tokens=5, sampling=Sampling(temperature=1.0)
            )
            model.train()
            return [{"prompt": "1 2 3", "text": " ".join(map(str, tokens))}]

        return write

    results = []
    for every, samples in ((50, False), (5, False), (5, True)):
        run = tmp_path / f"{every}-{samples}"
        job = nano_trainer(run, held_out=True, validation__every=every, training__steps=20)
        if samples:
            job.write_samples = written(job.model)
        train(job)
        assert len(metrics(run, "validation")) == (4 if every == 5 else 1)
        assert len(metrics(run, "sample")) == (4 if samples else 0)
        results.append((losses(run), files_of(run, 20)))
    assert results[1] == results[0]
    assert results[2] == results[0]


def test_without_held_out_windows_there_is_no_validation(tmp_path: Path) -> None:
    outcome = train(nano_trainer(tmp_path, validation__every=2))
    assert outcome.validation == {}
    assert metrics(tmp_path, "validation") == []


@pytest.mark.numeric
def test_a_line_is_the_mean_of_its_steps(tmp_path: Path) -> None:
    train(nano_trainer(tmp_path / "1", training__steps=7))
    train(nano_trainer(tmp_path / "3", training__steps=7, training__log_every=3))
    single = losses(tmp_path / "1")
    lines = metrics(tmp_path / "3", "train")
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert [line["tokens"] for line in lines] == [3 * 128, 6 * 128, 7 * 128]
    assert [line["learned"] for line in lines] == [3 * 128, 3 * 128, 128]
    means = [sum(single[:3]) / 3, sum(single[3:6]) / 3, single[6]]
    assert [line["loss"] for line in lines] == pytest.approx(means, rel=1e-6)


@pytest.mark.numeric
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_the_gradient_is_that_of_the_mean_over_what_is_learned(
    tmp_path: Path, micro_batch: int
) -> None:
    job = nano_trainer(tmp_path, "sft", training__steps=1, training__micro_batch=micro_batch)
    model = copy.deepcopy(job.model)
    batch = to_device(job.data.batch(0, 4), job.device)
    loss, count, _ = job.objective.loss(model, batch)
    (loss / count).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    train(job)
    [line] = metrics(tmp_path, "train")
    assert line["learned"] == int(count) < 4 * 32
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.numeric
def test_the_gradient_is_clipped(tmp_path: Path) -> None:
    """A tenth of the norm allowed is a tenth of the gradient, which plain momentum shows."""
    settings: dict[str, Any] = {"training__steps": 1, "optim__name": "adamw", "optim__beta1": 0.5}
    sizes = []
    for most in (1e-3, 1e-4, 1e9):
        train(nano_trainer(tmp_path / f"{most}", optim__grad_clip=most, **settings))
        place = tmp_path / f"{most}" / "checkpoints" / "step-00000001" / "optimizer.safetensors"
        tensors = load_file(place)
        moments = [t.flatten() for name, t in tensors.items() if name.startswith("exp_avg/")]
        sizes.append(float(torch.cat(moments).norm()) / 0.5)
        norm = metrics(tmp_path / f"{most}", "train")[0]["grad_norm"]
    assert sizes == pytest.approx([1e-3, 1e-4, norm], rel=1e-2)


# Being asked to stop.


class Stopping(Told):
    """Asks for a stop after a step, as Ctrl-C does."""

    def __init__(self, step: int | None, number: signal.Signals = signal.SIGINT) -> None:
        super().__init__()
        self._step, self._number = step, number

    def progress(self, done: int, total: int, note: str = "") -> None:
        if done == self._step:
            os.kill(os.getpid(), self._number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_and_gives_the_signals_back(tmp_path: Path, number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    outcome = train(nano_trainer(tmp_path, reporter=Stopping(5, number)))
    assert not outcome.finished
    assert outcome.steps == 5
    assert (tmp_path / "checkpoints" / "step-00000005").is_dir()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("call", "lora"), [*((call, False) for call in range(1, 9)), (6, True), (7, True)]
)
def test_a_stop_in_the_middle_of_a_step_does_not_wait_for_its_end(
    tmp_path: Path, call: int, lora: bool
) -> None:
    """A large step takes minutes. What was done of it is done again, and the end is the same."""

    def stop(loss: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGTERM)
        return loss

    # With dropout, which must draw the same numbers again for the step that was not finished.
    steps = {"training__steps": 3, "training__micro_batch": 1, "training__log_every": 3}
    settings = lora_settings(**steps) if lora else steps
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(nano_trainer(whole, **settings))
    job = nano_trainer(run, **settings)
    job.objective = Spoilt(job.objective, stop, {call})
    outcome = train(job)
    assert outcome.steps == (call - 1) // 4
    assert (run / "checkpoints").exists() == (outcome.steps > 0)
    assert train(nano_trainer(run, **settings)).finished
    assert metrics(run) == metrics(whole)
    assert files_of(run, 3) == files_of(whole, 3)


def test_a_stop_in_the_middle_of_a_validation_does_not_wait_for_its_end(tmp_path: Path) -> None:
    """A validation may take minutes too. The run that goes on begins with it."""

    def stop(loss: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGTERM)
        return loss

    settings: dict[str, Any] = {"held_out": True, "training__steps": 6, "validation__every": 2}
    settings |= {"validation__windows": 20, "training__micro_batch": 4}  # three at a time
    whole = tmp_path / "whole"
    ended = train(nano_trainer(whole, **settings))
    for validation, call in ((1, 4), (2, 8), (3, 15)):  # its second, first and last part
        run = tmp_path / f"{validation}"
        job = nano_trainer(run, **settings)
        job.objective = Spoilt(job.objective, stop, {call})
        outcome = train(job)
        assert (outcome.steps, outcome.finished) == (2 * validation, False)
        assert len(metrics(run, "validation")) == validation - 1
        again = train(nano_trainer(run, **settings))
        assert (again.finished, again.best) == (True, ended.best)
        assert metrics(run) == metrics(whole)
        assert files_of(run, 6) == files_of(whole, 6)


# Running out of memory.


def out_of_memory(loss: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.numeric
def test_where_memory_runs_out_fewer_windows_are_taken_at_once(tmp_path: Path) -> None:
    # With dropout, which must draw the same numbers again.
    wanted = nano_trainer(tmp_path / "wanted", **lora_settings(training__micro_batch=2))
    train(wanted)
    reporter = Told()
    job = nano_trainer(
        tmp_path / "short", reporter=reporter, **lora_settings(training__micro_batch=4)
    )
    job.objective = Spoilt(job.objective, out_of_memory, {1})
    train(job)
    assert job.micro_batch == 2
    assert metrics(job.run) == metrics(wanted.run)
    assert files_of(job.run, 20) == files_of(wanted.run, 20)
    assert "step 1: too little memory on cpu for 4 windows at once; going on with 2" in (
        "\n".join(reporter.lines)
    )


@pytest.mark.numeric
def test_what_is_left_of_the_step_is_forgotten(tmp_path: Path) -> None:
    """It ran out in the third of four parts of the second step."""
    settings = {"training__batch": 8, "training__steps": 4, "training__micro_batch": 2}
    job = nano_trainer(tmp_path / "short", **settings)
    job.objective = Spoilt(job.objective, out_of_memory, {7})
    train(job)
    assert job.micro_batch == 1
    found = losses(job.run)
    train(nano_trainer(tmp_path / "wanted", **settings))
    assert found == pytest.approx(losses(tmp_path / "wanted"), rel=1e-5)
    assert found[0] == losses(tmp_path / "wanted")[0]
    again = nano_trainer(tmp_path / "short", **settings)
    train(again)
    assert again.micro_batch == 1  # it is remembered


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed-again"])
def test_what_filled_the_memory_is_gone_before_it_goes_on(
    tmp_path: Path, where: str, again: bool
) -> None:
    """Everything that the failed part has computed, while collecting garbage is left to us."""
    computed: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Looking(Reporter):
        def say(self, text: str) -> None:
            if "too little memory" in text:
                alive.append(sum(one() is not None for one in computed))

    def keep(module: torch.nn.Module, given: object, out: Tensor) -> None:
        if not alive:
            computed.append(weakref.ref(out))

    def spoil(loss: Tensor) -> Tensor:
        if where == "forward":
            return out_of_memory(loss)
        layer = job.model.model.layers[0]
        layer.register_full_backward_pre_hook(lambda *_: fail())
        return loss

    def fail() -> None:
        if not alive:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    job = nano_trainer(
        tmp_path,
        reporter=Looking(),
        training__steps=2,
        training__micro_batch=4,
        training__activation_checkpointing=again,
    )
    for layer in job.model.model.layers:
        layer.register_forward_hook(keep)
    job.objective = Spoilt(job.objective, spoil, {1})
    gc.disable()
    try:
        train(job)
    finally:
        gc.enable()
    assert job.micro_batch == 2 and len(computed) >= 2
    assert alive == [0]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 5.04 GB, max allowed: 5.10 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:120] DefaultCPUAllocator: can't allocate"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_short_memory_is_known_by_whatever_tells_it(tmp_path: Path, error: RuntimeError) -> None:
    def fail(loss: Tensor) -> Tensor:
        raise error

    job = nano_trainer(tmp_path, training__steps=2, training__micro_batch=4)
    job.objective = Spoilt(job.objective, fail, {1})
    train(job)
    assert job.micro_batch == 2


def test_one_window_at_once_that_does_not_fit_ends_the_run(tmp_path: Path) -> None:
    job = nano_trainer(tmp_path, training__micro_batch=1)
    job.objective = Spoilt(job.objective, out_of_memory, {1})
    with pytest.raises(ResourceError, match=r"training\.activation_checkpointing=true"):
        train(job)


# The best.


@dataclass
class Judged:
    """An objective whose validations come out as given."""

    objective: Objective
    model: Transformer
    values: list[float]

    def loss(
        self, model: Transformer, batch: TensorBatch
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return self.objective.loss(model, batch)

    def figures(self, loss: float, sums: dict[str, float]) -> dict[str, float]:
        figures = self.objective.figures(loss, sums)
        judged = {} if self.model.training else {"bits_per_byte": self.values.pop(0)}
        return figures | judged

    def note(self, figures: dict[str, float]) -> str:
        return ""

    def warning(self, share: float, figures: dict[str, float]) -> str | None:
        return None


@pytest.mark.parametrize(
    ("keep_best", "left"), [(True, [8, 20, 22]), (False, [20, 22])], ids=["kept", "not-kept"]
)
def test_the_best_by_validation_is_saved_and_kept(
    tmp_path: Path, keep_best: bool, left: list[int]
) -> None:
    settings: dict[str, Any] = {"training__steps": 22, "validation__every": 4}
    settings |= {"checkpoint__every": 5, "checkpoint__keep_best": keep_best}
    values = [3.0, 2.0, math.nan, 2.5, 2.0, 4.0]  # of steps 4, 8, 12, 16, 20, 22
    for stops in ((), (9, 21)):
        run = tmp_path / f"{len(stops)}"
        to_come = list(values)
        for stop in (*stops, None):
            job = nano_trainer(run, held_out=True, reporter=Stopping(stop), **settings)
            job.objective = Judged(job.objective, job.model, to_come)
            outcome = train(job)
        assert outcome.best == {"step": 8, "figure": "bits_per_byte", "value": 2.0}
        saved = sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())
        assert saved == (left if not stops else sorted({*left, 21} - {20}))


def test_without_bits_per_byte_the_loss_tells_which_is_the_best(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"training__steps": 30, "optim__lr": 3e-3}
    outcome = train(nano_trainer(tmp_path, "dpo", held_out=True, **settings))
    lines = {line["step"]: line["loss"] for line in metrics(tmp_path, "validation")}
    best = min(lines, key=lambda step: lines[step])
    assert outcome.best == {"step": best, "figure": "loss", "value": lines[best]}


# Half precision: on a CPU, which can do fp16 too, only slowly; the very path of an older GPU.


def fp16_run(
    run: Path, steps: int, reporter: Told | None = None, scale: float = 2.0**40
) -> Trainer:
    job = nano_trainer(run, training__steps=steps, optim__lr=3e-3, reporter=reporter)
    job.precision = Precision("fp16", "cpu", LossScaler(scale, enabled=True))
    return job


def test_training_in_fp16_learns_as_in_fp32(tmp_path: Path) -> None:
    exact = nano_trainer(tmp_path / "fp32", training__steps=60, optim__lr=3e-3)
    rough = fp16_run(tmp_path / "fp16", 60, scale=2.0**12)
    train(exact)
    train(rough)
    assert rough.precision.scaler.good_steps == 60  # none was skipped
    assert losses(rough.run) == pytest.approx(losses(exact.run), rel=0.02)
    assert losses(rough.run)[-1] < losses(rough.run)[0] - 0.5


def test_training_in_fp16_finds_its_scale(tmp_path: Path) -> None:
    job = fp16_run(tmp_path, 50)
    train(job)
    assert 2.0**8 < job.precision.scaler.scale < 2.0**40
    assert job.precision.scaler.good_steps > 5
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.3


def test_a_run_in_fp16_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, stopped = fp16_run(tmp_path / "whole", 50), tmp_path / "stopped"
    train(whole)
    assert train(fp16_run(stopped, 50, Stopping(27))).steps == 27
    again = fp16_run(stopped, 50)
    again.precision.scaler.scale = 3.0  # what the checkpoint says counts
    assert train(again).finished
    assert again.precision.scaler == whole.precision.scaler
    assert files_of(stopped, 50) == files_of(whole.run, 50)


# Row 7: bad numbers.


@dataclass
class Spoilt:
    """An objective that goes bad at some calls: two calls are a step here."""

    objective: Objective
    spoil: Callable[[Tensor], Tensor]
    calls: set[int]
    call: int = 0

    def loss(
        self, model: Transformer, batch: TensorBatch
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss, count, more = self.objective.loss(model, batch)
        self.call += 1
        return (self.spoil(loss) if self.call in self.calls else loss), count, more

    def figures(self, loss: float, sums: dict[str, float]) -> dict[str, float]:
        return self.objective.figures(loss, sums)

    def note(self, figures: dict[str, float]) -> str:
        return self.objective.note(figures)

    def warning(self, share: float, figures: dict[str, float]) -> str | None:
        return self.objective.warning(share, figures)


def bad_gradient(loss: Tensor) -> Tensor:
    """The same loss, whose gradient is not a number."""
    return loss + (loss * 0.0).sqrt() * 0.0


def endless_gradient(loss: Tensor) -> Tensor:
    """The same loss, whose gradient is infinite."""
    return loss + (loss - loss.detach()) * 1e38 * 1e38


SPOILS: dict[str, Callable[[Tensor], Tensor]] = {
    "loss-nan": lambda loss: loss * math.nan,
    "loss-inf": lambda loss: loss * math.inf,
    "gradient": bad_gradient,
    "gradient-inf": endless_gradient,
}


def spoilt(run: Path, spoil: str, calls: set[int], **settings: Any) -> tuple[Trainer, Told]:
    told = Told()
    settings = {"checkpoint__every": 1, "checkpoint__keep": 99, "training__steps": 7} | settings
    job = nano_trainer(run, reporter=told, **settings)
    job.objective = Spoilt(job.objective, SPOILS[spoil], calls)
    return job, told


@pytest.mark.parametrize("calls", [{9}, {10}, {9, 10}], ids=["first", "second", "both"])
@pytest.mark.parametrize("spoil", SPOILS)
def test_a_bad_step_changes_nothing_and_is_told(
    tmp_path: Path, spoil: str, calls: set[int]
) -> None:
    job, told = spoilt(tmp_path, spoil, calls)
    assert train(job).finished
    assert files_of(tmp_path, 5) == files_of(tmp_path, 4)
    assert files_of(tmp_path, 6) != files_of(tmp_path, 5)
    assert told.lines == [
        "step 5 (samples 16-19): the gradient is not finite; nothing was changed by it"
    ]
    written = [{"kind": "skipped", "step": 5, "samples": [16, 17, 18, 19]}]
    assert metrics(tmp_path, "skipped") == written
    assert [line["step"] for line in metrics(tmp_path, "train") if line["grad_norm"] is None] == [5]
    assert all(t.isfinite().all() for t in job.model.state_dict().values())


def test_two_bad_steps_in_a_row_are_passed(tmp_path: Path) -> None:
    calls = {9, 11, 15, 17}  # steps 5, 6, 8, 9
    job, told = spoilt(tmp_path, "loss-nan", calls, training__steps=10)
    assert train(job).finished
    assert len(told.lines) == 4
    assert files_of(tmp_path, 6) == files_of(tmp_path, 4) != files_of(tmp_path, 7)


def test_the_third_halts_the_run_with_the_reason(tmp_path: Path) -> None:
    job, told = spoilt(tmp_path, "gradient", {9, 11, 13, 15})
    with pytest.raises(TrainingError) as caught:
        train(job)
    assert str(caught.value).startswith(
        f"{tmp_path}: 3 steps in a row gave numbers that are not finite, up to step 7 "
        "(samples 24-27). Try a lower optim.lr"
    )
    assert len(told.lines) == 3
    assert not told.open, "a progress bar that is left open hides the cursor"
    assert files_of(tmp_path, 6) == files_of(tmp_path, 4)
    assert [line["step"] for line in metrics(tmp_path, "train")] == [1, 2, 3, 4, 5, 6]


def test_they_are_counted_over_an_interruption(tmp_path: Path) -> None:
    job, _ = spoilt(tmp_path, "loss-nan", {9, 11})
    job.reporter = Stopping(6)
    assert train(job).steps == 6
    again, _ = spoilt(tmp_path, "loss-nan", {1})
    with pytest.raises(TrainingError, match=r"3 steps in a row .* up to step 7"):
        train(again)
    assert [line["step"] for line in metrics(tmp_path, "skipped")] == [5, 6, 7]


# Row 11: nothing to learn.


def chats(*conversations: tuple[int, int]) -> Shard:
    """Conversations by their length and the first token of their answer (as long: no answer)."""
    mask = [place >= answer for length, answer in conversations for place in range(length)]
    ends = torch.tensor([length for length, _ in conversations]).cumsum(0).numpy()
    tokens = text_shard(len(mask)).tokens
    return Shard(tokens, torch.tensor(mask, dtype=torch.uint8).numpy(), ends)


def test_answers_that_are_cut_away_or_empty_are_counted_and_never_nan(tmp_path: Path) -> None:
    bad = [(50, 40), (20, 20), (33, 33), (34, 33), (90, 80)]
    good = [(50, 20), (20, 10), (33, 32), (34, 32), (8, 4)]
    windows = ChatWindows([chats(*bad, *good)], 32, pad=0, seed=0)
    report = windows.report
    assert report.conversations == 10
    assert report.unsupervised == 5  # all of the bad ones
    assert report.cut == 5  # longer than 33 tokens: the last token is only a label
    train(nano_trainer(tmp_path, "sft", parts=[windows], held_out=True))
    assert all(math.isfinite(loss) for loss in losses(tmp_path))
    assert all(line["learned"] > 0 for line in metrics(tmp_path, "train"))


class Unlearned(ChatWindows):
    """Windows of which some have no labels."""

    empty: frozenset[int] = frozenset()

    def window(self, index: int) -> Any:
        tokens, labels, segments = super().window(index)
        return tokens, labels * 0 + IGNORED if index in self.empty else labels, segments


def test_windows_without_labels_are_no_harm_but_a_whole_batch_of_them_is(tmp_path: Path) -> None:
    windows = Unlearned([chat_shard()], 32, pad=0, seed=0)
    job = nano_trainer(tmp_path / "some", "sft", parts=[windows])
    batches = [job.data.order.locate(4 * step, 4) for step in range(20)]
    windows.empty = frozenset(index for batch in batches for _, index in batch[1:]) - {
        batch[0][1] for batch in batches
    }
    assert len(windows.empty) > 5
    train(job)
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "some"))
    windows.empty = frozenset(index for _, index in batches[3])
    with pytest.raises(TrainingError, match=f"{tmp_path}.*a whole batch has nothing to learn"):
        train(nano_trainer(tmp_path / "all", "sft", parts=[windows]))
