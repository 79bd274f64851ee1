"""Self-test of a machine: train for a few steps, stop, and resume bit-identically."""

import json
import math
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file

from minimind.config import load_recipe
from minimind.data.textbook import prose
from minimind.errors import MinimindError
from minimind.model.device import choose_device
from minimind.tokenizer import train_tokenizer
from minimind.training.reporter import Reporter
from minimind.training.stage import StageResult, run_stage

_STEPS = 6


@dataclass(frozen=True)
class Check:
    """The outcome of one part of the self-test."""

    name: str
    passed: bool
    seconds: float
    note: str


def selftest(device: str = "auto") -> list[Check]:
    """Train the smallest model for a few steps, stop and resume; return a check for each part.

    The first failure ends the test. Raises ResourceError for a device that this machine lacks.
    """
    choose_device(device)
    checks: list[Check] = []
    with tempfile.TemporaryDirectory(prefix="minimind-doctor-") as work:
        test = _SelfTest(Path(work), device)
        for name, run_part in test.parts().items():
            started = time.perf_counter()
            try:
                passed, note = run_part()
            except (MinimindError, OSError, RuntimeError) as error:
                passed, note = False, str(error)
            checks.append(Check(name, passed, time.perf_counter() - started, note))
            if not passed:
                break
    return checks


class _SelfTest:
    def __init__(self, work: Path, device: str) -> None:
        self._work, self._device = work, device
        self._uninterrupted: StageResult | None = None

    def parts(self) -> dict[str, Callable[[], tuple[bool, str]]]:
        """Return the functions that run the parts, by name; each returns (passed, note)."""
        return {
            "train a tokenizer": self._train_tokenizer,
            f"train for {_STEPS} steps": self._train_model,
            "stop and resume bit-identically": self._resume,
        }

    def _train_tokenizer(self) -> tuple[bool, str]:
        texts = list(islice(prose(0), 1_000))
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (self._work / "texts.jsonl").write_text(lines, encoding="utf-8")
        tokenizer = train_tokenizer(texts, vocab_size=600)
        tokenizer.save(self._work / "tokenizer")
        return True, f"{tokenizer.vocab_size:,} tokens"

    def _run(self, name: str, reporter: Reporter) -> StageResult:
        settings = {
            "objective": "pretrain",
            "out": str(self._work / name),
            "tokenizer": str(self._work / "tokenizer"),
            "device": self._device,
            "model.preset": "nano",
            "data.sources": [str(self._work / "texts.jsonl")],
            "data.store": str(self._work / "stores"),
            "data.seq_len": 64,
            "training.steps": _STEPS,
            "training.global_batch_size": 4,
            "training.log_every": 1,
            "validation.num_sequences": 4,
        }
        return run_stage(load_recipe(None, flags=settings).recipe, reporter=reporter)

    def _train_model(self) -> tuple[bool, str]:
        self._uninterrupted = self._run("uninterrupted", Reporter())
        bits, precision = (
            self._uninterrupted.summary[key] for key in ("bits_per_byte", "precision")
        )
        return math.isfinite(bits), f"in {precision}, {bits:.2f} bits per byte"

    def _resume(self) -> tuple[bool, str]:
        stopped = self._run("stopped", _StopAfter(_STEPS // 2))
        resumed = self._run("stopped", Reporter())
        expected = self._uninterrupted
        assert expected is not None and expected.model is not None
        if stopped.finished or resumed.model is None:
            return False, "the run did not stop, or did not resume"
        first, second = (
            load_file(model / "model.safetensors") for model in (expected.model, resumed.model)
        )
        difference = max(float((first[k].float() - second[k].float()).abs().max()) for k in first)
        if difference == 0:
            return True, "equal"
        # Some GPU kernels sum in an order that varies from run to run.
        on_gpu = torch.device(resumed.summary["device"]).type != "cpu"
        return on_gpu and difference < 1e-3, f"weights differ by up to {difference:.1e}"


class _StopAfter(Reporter):
    """Reporter that requests a stop after a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self._step = step

    def progress(self, done: int, total: int, note: str = "") -> None:
        if done == self._step and total == _STEPS:
            signal.raise_signal(signal.SIGINT)
