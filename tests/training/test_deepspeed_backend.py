"""DeepSpeed's ZeRO against the engine of our own: the same losses, bad steps, checkpoints."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind.config import load_recipe
from minimind.errors import ConfigError, install_line
from minimind.training.build import check_recipe
from minimind.training.deepspeed_backend import _without_future_warnings
from tests.support.small_runs import (
    Lives,
    assert_in_step,
    files_of,
    lora_settings,
    losses,
    metrics,
    samples,
    share,
)

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason=install_line("deepspeed")
)
# The first use of DeepSpeed compiles for a minute.
slow = [pytest.mark.slow, pytest.mark.timeout(1200), needs_deepspeed]
ADAMW = {"optim__name": "adamw"}


def zero(stage: int) -> dict[str, Any]:
    return ADAMW | {"training__backend": "deepspeed", "training__zero_stage": stage}


def refusal(monkeypatch: pytest.MonkeyPatch, installed: bool = True, **settings: Any) -> str:
    monkeypatch.setattr(
        "minimind.training.build.find_spec", lambda name: object() if installed else None
    )
    flags = {"objective": "pretrain", "training.backend": "deepspeed", "optim.name": "adamw"}
    with pytest.raises(ConfigError) as caught:
        check_recipe(load_recipe(None, flags=flags | settings).recipe)
    return str(caught.value)


def test_warnings_are_silenced_for_its_calls_alone() -> None:
    before = list(warnings.filters)
    with _without_future_warnings():
        warnings.warn_explicit("old", FutureWarning, "x.py", 1, module="torch.distributed.c10d")
        with pytest.raises(UserWarning, match="other"):
            warnings.warn_explicit("other", UserWarning, "x.py", 1)
    assert warnings.filters == before


def test_what_it_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert install_line("deepspeed") in refusal(monkeypatch, installed=False)
    assert 'optim.name = "adamw"' in refusal(monkeypatch, **{"optim.name": "muon"})
    assert "training.compile" in refusal(monkeypatch, **{"training.compile": True})


class TestZero:
    pytestmark = slow

    @pytest.mark.parametrize("stage", [1, 2, 3])
    @pytest.mark.parametrize("kind", ["pretrain", "moe", "lora", "dpo", "bf16", "clipped", "again"])
    def test_the_losses_are_those_of_our_own_engine(
        self, lives: Lives, tmp_path: Path, kind: str, stage: int
    ) -> None:
        """Two processes, two micro-batches a step each; validations too."""
        objective = {"lora": "sft", "dpo": "dpo"}.get(kind, "pretrain")
        more: dict[str, Any] = {"held_out": True, "validation__every": 4}
        more |= {"moe": {"model__preset": "nano-moe"}, "lora": lora_settings()}.get(kind, {})
        more |= {"training__precision": "bf16"} if kind == "bf16" else {}
        more |= {"training__activation_checkpointing": kind == "again"}
        more |= {"optim__grad_clip": 0.05} if kind == "clipped" else {}
        share(lives, tmp_path / "own", 2, objective, **ADAMW | more)
        share(lives, tmp_path / "zero", 2, objective, **zero(stage) | more)
        assert samples(tmp_path / "zero", 2) == list(range(32))
        for lines in ("train", "validation"):
            own, theirs = (metrics(tmp_path / name, lines) for name in ("own", "zero"))
            assert [line.keys() for line in theirs] == [line.keys() for line in own]
            for name in ("loss", "grad_norm") if lines == "train" else ("loss",):
                told = [line[name] for line in theirs]
                close = 1e-3 if kind == "bf16" else 1e-5
                assert told == pytest.approx([line[name] for line in own], rel=close)

    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_it_stops_and_goes_on(self, lives: Lives, tmp_path: Path, stage: int) -> None:
        """To the same bits with as many processes, and to the same losses with another number."""
        settings = zero(stage) | {"training__global_batch_size": 6, "training__steps": 12}
        whole, run, other = tmp_path / "whole", tmp_path / "run", tmp_path / "other"
        share(lives, whole, 2, **settings)
        share(lives, run, 2, stop=(1, 14), **settings)
        said = share(lives, run, 2, **settings)
        assert "going on from step 4" in said
        assert files_of(run, 12) == files_of(whole, 12)
        assert metrics(run) == metrics(whole)
        seen = []
        for processes, stop in ((2, (1, 14)), (3, (2, 9)), (1, None)):
            share(lives, other, processes, stop=stop, **settings)
            seen += samples(other, processes, batch=6)
        assert seen == list(range(72))
        assert losses(other) == pytest.approx(losses(whole), rel=1e-5)

    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_bad_numbers_change_nothing(self, lives: Lives, tmp_path: Path, stage: int) -> None:
        settings = zero(stage) | {"checkpoint__every": 1, "checkpoint__keep": 99}
        said = share(lives, tmp_path, 2, spoil=(1, [9]), **settings)
        assert "step 5 (samples 16-19): the gradient is not finite" in said
        assert files_of(tmp_path, 5) == files_of(tmp_path, 4) != files_of(tmp_path, 6)
        assert all(torch.tensor(losses(tmp_path)[5:]).isfinite())
        if stage < 3:
            assert_in_step(tmp_path, 2)
