"""A short trial of what training rests on: steps, a save, going on to the same bits."""

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
    """One part of the trial: how long it took, and a word on how it went."""

    name: str
    passed: bool
    seconds: float
    note: str


def selftest(device: str = "auto") -> list[Check]:
    """Train the smallest model for a few steps, stop and go on: a check for each part.

    After one that fails there are no more. Raises ResourceError for a device that is not there.
    """
    choose_device(device)
    checks: list[Check] = []
    with tempfile.TemporaryDirectory(prefix="minimind-doctor-") as work:
        trial = _Trial(Path(work), device)
        for name, part in trial.parts().items():
            started = time.perf_counter()
            try:
                passed, note = part()
            except (MinimindError, OSError, RuntimeError) as error:
                passed, note = False, str(error)
            checks.append(Check(name, passed, time.perf_counter() - started, note))
            if not passed:
                break
    return checks


class _Trial:
    def __init__(self, work: Path, device: str) -> None:
        self._work, self._device = work, device
        self._whole: StageResult | None = None

    def parts(self) -> dict[str, Callable[[], tuple[bool, str]]]:
        return {
            "a text, a tokenizer": self._prepare,
            f"{_STEPS} steps of training, a save": self._train,
            "stopped half-way, the same bits": self._resume,
        }

    def _prepare(self) -> tuple[bool, str]:
        texts = list(islice(prose(0), 1_000))
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (self._work / "texts.jsonl").write_text(lines, encoding="utf-8")
        tokenizer = train_tokenizer(texts, vocab_size=600)
        tokenizer.save(self._work / "tokenizer")
        return True, f"{tokenizer.vocab_size:,} words"

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

    def _train(self) -> tuple[bool, str]:
        self._whole = self._run("whole", Reporter())
        bits, precision = (self._whole.summary[key] for key in ("bits_per_byte", "precision"))
        return math.isfinite(bits), f"in {precision}, {bits:.2f} bits per byte"

    def _resume(self) -> tuple[bool, str]:
        stopped = self._run("stopped", _StopAfter(_STEPS // 2))
        again = self._run("stopped", Reporter())
        assert self._whole is not None and self._whole.model is not None
        if stopped.finished or again.model is None:
            return False, "the run did not stop, or did not go on"
        wanted, found = (
            load_file(place / "model.safetensors") for place in (self._whole.model, again.model)
        )
        furthest = max(float((wanted[k].float() - found[k].float()).abs().max()) for k in wanted)
        if furthest == 0:
            return True, "equal"
        # Some kernels of GPUs add up in an order that changes.
        on_gpu = torch.device(again.summary["device"]).type != "cpu"
        return on_gpu and furthest < 1e-3, f"weights differ by up to {furthest:.1e}"


class _StopAfter(Reporter):
    """Asks for a stop after a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self._step = step

    def progress(self, done: int, total: int, note: str = "") -> None:
        if done == self._step and total == _STEPS:
            signal.raise_signal(signal.SIGINT)
