"""Training runs of the nano model for tests: in memory, from files, distributed, killed."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from select import select
from typing import Any

import numpy as np
import torch

from minimind.config import load_recipe
from minimind.config.settings import Recipe
from minimind.data.packing import (
    ChatSequences,
    MixedDataset,
    PairSequences,
    Sequences,
    TextSequences,
)
from minimind.data.store import Shard
from minimind.model import Transformer, apply_lora
from minimind.training.distributed import SINGLE_PROCESS, ProcessGroup
from minimind.training.objectives.next_token import NextToken
from minimind.training.objectives.preference import Preference
from minimind.training.precision import choose_precision
from minimind.training.reference_logprobs import compute_reference_logprobs
from minimind.training.reporter import Reporter
from minimind.training.trainer import Trainer
from tests.support.commands import fast_python

VOCAB = 97
EVENTS = ("corrupt", "stop", "kill", "unwatched", "unlabeled", "out_of_memory")  # of driver.py
REFUSED = 3  # exit status of a save that failed with ResourceError
# Keys of metrics.jsonl that depend on the clock and the machine.
_CLOCK = ("elapsed_s", "tokens_per_second", "data_wait_fraction", "peak_memory_bytes")
_NANO = {
    "device": "cpu",
    "seed": 7,
    "model.preset": "nano",
    "data.seq_len": 32,
    "training.precision": "fp32",
    "training.global_batch_size": 4,
    "training.micro_batch_size": 2,
    "training.log_every": 1,
    "validation.every": 10,
    "validation.num_sequences": 4,
    "checkpoint.every": 100,
}


def nano_settings(objective: str, out: Path, **settings: Any) -> dict[str, Any]:
    """Return settings by dotted key; `settings` overrides them, with `__` instead of dots."""
    overrides = {key.replace("__", "."): value for key, value in settings.items()}
    nano = dict(_NANO)
    if "model.init" in overrides:  # its configuration decides the shape
        del nano["model.preset"]
    return nano | {"objective": objective, "out": str(out)} | overrides


def nano_recipe(objective: str, out: Path, **settings: Any) -> Recipe:
    """Return a recipe of `nano_settings`."""
    return load_recipe(None, flags=nano_settings(objective, out, **settings)).recipe


def text_shard(length: int = 3000) -> Shard:
    """Running text of a synthetic language in which each token helps to predict the next."""
    tokens = [1]
    for position in range(length - 1):
        tokens.append(1 + (7 * tokens[-1] + (position * position) % 5) % (VOCAB - 1))
    return Shard(np.array(tokens, np.uint16), None, np.array([length]))


def chat_shard(conversations: int = 60) -> Shard:
    """Conversations of 6 to 45 tokens, whose second half is the answer."""
    lengths = [6 + (number * 17) % 40 for number in range(conversations)]
    mask = [position >= length // 2 for length in lengths for position in range(length)]
    tokens = text_shard(sum(lengths)).tokens
    return Shard(tokens, np.array(mask, np.uint8), np.cumsum(lengths))


def pair_shard(pairs: int = 60) -> Shard:
    """Preference pairs of 5 to 15 tokens per side; the last 2 to 6 tokens are the answer."""
    tokens: list[int] = []
    mask: list[int] = []
    ends: list[int] = []
    for pair in range(pairs):
        prompt = [1 + (5 * pair + i) % (VOCAB - 1) for i in range(3 + pair % 7)]
        for side in (0, 1):
            answer = [
                1 + (11 * pair + 31 * side + 3 * i) % (VOCAB - 1) for i in range(2 + side * 4)
            ]
            tokens += prompt + answer[: 2 + (pair + side) % 5]
            mask += [0] * len(prompt) + [1] * len(answer[: 2 + (pair + side) % 5])
            ends.append(len(tokens))
    return Shard(np.array(tokens, np.uint16), np.array(mask, np.uint8), np.array(ends))


def nano_trainer(
    run: Path,
    objective: str = "pretrain",
    *,
    parts: list[Sequences] | None = None,
    held_out: bool = False,
    reporter: Reporter | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
    **settings: Any,
) -> Trainer:
    """Return a trainer of 20 steps, without tokenizer, files and token store.

    held_out: validate on the training data.
    """
    recipe = nano_recipe(objective, run, **{"training__steps": 20} | settings)
    run.mkdir(parents=True, exist_ok=True)
    if parts is None:
        seq_len = recipe.data.seq_len
        packed: dict[str, Sequences] = {
            "pretrain": TextSequences([text_shard()], seq_len),
            "sft": ChatSequences([chat_shard()], seq_len, pad_id=0, seed=recipe.seed),
            "dpo": PairSequences([pair_shard()], seq_len, pad_id=0, seed=recipe.seed),
        }
        parts = [packed[objective]]
    mix = MixedDataset(parts, [1.0] * len(parts), recipe.seed)
    torch.manual_seed(recipe.seed)
    device = torch.device("cpu")
    model = Transformer(recipe.model.shape(VOCAB))
    model.activation_checkpointing = recipe.training.activation_checkpointing
    if recipe.lora:
        apply_lora(model, recipe.lora)
    assert recipe.training.steps and recipe.training.micro_batch_size
    balance = recipe.training.router_aux_loss_coef
    token_bytes = [0, *(1 + token % 3 for token in range(1, VOCAB))]
    trainer = Trainer(
        model=model,
        objective=Preference(recipe.dpo, router_aux_loss_coef=balance)
        if objective == "dpo"
        else NextToken(token_bytes, device, router_aux_loss_coef=balance),
        data=mix,
        validation_data=mix if held_out else None,
        recipe=recipe,
        run=run,
        num_steps=recipe.training.steps,
        micro_batch_size=recipe.training.micro_batch_size,
        device=device,
        precision=choose_precision(recipe.training.precision, device),
        reporter=reporter or Reporter(),
        group=group,
    )
    if objective == "dpo":
        compute_reference_logprobs(trainer)
    return trainer


def tensors(step: int, numbers: int) -> dict[str, Any]:
    """Return arguments of save_checkpoint, as a run might pass them after `step` steps."""
    generator = torch.Generator().manual_seed(step)
    first, second = (torch.randn(numbers, generator=generator) for _ in range(2))
    state = {"metrics_offset": step, "text": "长江" * 50}
    return {"model": {"weight": first}, "optimizer": {"moment": second}, "state": state}


def lora_settings(**settings: Any) -> dict[str, Any]:
    """Return settings of LoRA with dropout, so that a run depends on the random generator."""
    return {"lora__rank": 4, "lora__dropout": 0.2, "optim__name": "adamw"} | settings


class RecordingReporter(Reporter):
    """Records the lines that are reported."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.open = False  # a task has started and not stopped

    def start(self, title: str, total: int, done: int = 0, unit: str = "step") -> None:
        self.open = True

    def stop(self) -> None:
        self.open = False

    def say(self, text: str) -> None:
        self.lines.append(text)


class StoppingReporter(RecordingReporter):
    """Sends a signal to this process after a step, as Ctrl-C does."""

    def __init__(self, step: int | None, number: signal.Signals = signal.SIGINT) -> None:
        super().__init__()
        self._step, self._number = step, number

    def progress(self, done: int, total: int, note: str = "") -> None:
        if done == self._step:
            os.kill(os.getpid(), self._number)


def metrics(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, of one kind, without values that depend on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [
        {key: value for key, value in line.items() if key not in _CLOCK}
        for line in lines
        if kind in (None, line["kind"])
    ]


def losses(run: Path) -> list[float]:
    """Return the training loss of each line."""
    return [line["loss"] for line in metrics(run, "train")]


def steps_done(run: Path) -> int:
    """Return the number of training lines in metrics.jsonl."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b'"kind": "train"') if path.exists() else 0


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll until the condition holds; pytest's timeout ends the wait."""
    while not condition():
        time.sleep(0.005)


class Child:
    """A process that runs a function of driver.py."""

    def __init__(self, pid: int, fork_server: "ForkServer") -> None:
        self.pid, self._server = pid, fork_server

    def wait_for(self, text: str) -> None:
        """Wait until it has printed `text`."""
        output, answers = self._server.output, self._server.answers

        def has_ended() -> bool:
            return bool(select([answers], [], [], 0)[0])

        wait_until(lambda: text in output.read_text() or has_ended())
        assert text in output.read_text(), output.read_text()

    def wait(self) -> int:
        """Wait for its end; return the exit status, or minus the signal that killed it."""
        self._server.running = None
        return int(self._server.answer()["status"])


class ForkServer:
    """Starts child processes that may be killed, one at a time, by forking driver.py."""

    def __init__(self, output: Path) -> None:
        self.output = output  # standard output and error of the newest child
        self.running: Child | None = None
        self._process = subprocess.Popen(
            [*fast_python(), "-m", "tests.support.driver", output],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdin and self._process.stdout
        self._commands, self.answers = self._process.stdin, self._process.stdout

    def start(self, work: str, **arguments: Any) -> Child:
        """Start a child that calls the function `work` of driver.py."""
        self.stop()
        self.output.write_text("")
        line = json.dumps({"work": work, "arguments": arguments}, default=str)
        self._commands.write(line + "\n")
        self._commands.flush()
        self.running = Child(self.answer()["pid"], self)
        return self.running

    def run(self, work: str, **arguments: Any) -> int:
        """Start a child and wait; return its exit status, or minus the signal that killed it."""
        return self.start(work, **arguments).wait()

    def answer(self) -> dict[str, Any]:
        """Read the next message of driver.py."""
        return dict(json.loads(self.answers.readline()))

    def stop(self) -> None:
        """Kill a child that a failed test left running."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.running.pid, signal.SIGKILL)
            self.running.wait()

    def close(self) -> None:
        """Stop driver.py."""
        self.stop()
        self._process.communicate("")


def run_distributed(
    fork_server: ForkServer, run: Path, processes: int, objective: str = "pretrain", **settings: Any
) -> str:
    """Train `nano_trainer` in several processes; return their output.

    `settings` may contain EVENTS, which driver.py describes.
    """
    events = {name: settings.pop(name) for name in EVENTS if name in settings}
    defaults: dict[str, Any] = {"training__micro_batch_size": 1, "training__steps": 8}
    status = fork_server.run(
        "train_distributed",
        processes=processes,
        run=run,
        objective=objective,
        settings=defaults | settings,
        **events,
    )
    output = fork_server.output.read_text()
    assert (status == 0) != ("kill" in events), output
    return output


def samples_seen(run: Path, processes: int, batch: int = 4) -> list[int]:
    """Return the samples of all completed steps, step by step and rank by rank."""
    steps, samples = int((run / "steps-0").read_text()), []
    for rank in range(processes):
        reads = json.loads((run / f"samples-{rank}").read_text())
        samples += [
            (start // batch, rank, sample)
            for start, count in reads
            for sample in range(start, start + count)
            if sample < steps * batch
        ]
    return [sample for _, _, sample in sorted(samples)]


def checkpoint_files(run: Path, step: int) -> dict[str, bytes]:
    """Return the tensor files of a checkpoint as bytes."""
    folder = run / "checkpoints" / f"step-{step:08}"
    return {name: (folder / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")}


def assert_replicas_equal(run: Path, processes: int) -> None:
    """Assert that all processes ended with the same weights, bit by bit."""
    first, *others = (
        torch.load(run / f"weights-{rank}", weights_only=True) for rank in range(processes)
    )
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
