"""DeepSpeed's ZeRO against `TorchBackend`: the same losses, skipped steps and checkpoints."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind.config import load_recipe
from minimind.config.settings import Recipe
from minimind.errors import ConfigError, install_line
from minimind.training.build import check_backend_installed, check_recipe
from minimind.training.deepspeed_backend import _without_future_warnings
from tests.support.small_runs import (
    ForkServer,
    assert_replicas_equal,
    checkpoint_files,
    lora_settings,
    losses,
    metrics,
    run_distributed,
    samples_seen,
)

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason=install_line("deepspeed")
)
# The first use of DeepSpeed compiles C++ for a minute.
slow = [pytest.mark.slow, pytest.mark.timeout(1200), needs_deepspeed]
ADAMW = {"optim__name": "adamw"}


def zero(stage: int) -> dict[str, Any]:
    return ADAMW | {"training__backend": "deepspeed", "training__zero_stage": stage}


def deepspeed_recipe(**settings: Any) -> Recipe:
    flags = {"objective": "pretrain", "training.backend": "deepspeed", "optim.name": "adamw"}
    return load_recipe(None, flags=flags | settings).recipe


def test_warnings_are_silenced_only_inside_the_context() -> None:
    before = list(warnings.filters)
    with _without_future_warnings():
        warnings.warn_explicit("old", FutureWarning, "x.py", 1, module="torch.distributed.c10d")
        with pytest.raises(UserWarning, match="other"):
            warnings.warn_explicit("other", UserWarning, "x.py", 1)
    assert warnings.filters == before


def test_unsupported_settings_are_errors() -> None:
    with pytest.raises(ConfigError, match=r'optim\.name = "adamw"'):
        check_recipe(deepspeed_recipe(**{"optim.name": "muon"}))
    with pytest.raises(ConfigError, match=r"training\.compile"):
        check_recipe(deepspeed_recipe(**{"training.compile": True}))


def test_deepspeed_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minimind.training.build.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        check_backend_installed(deepspeed_recipe())
    assert install_line("deepspeed") in str(caught.value)
    monkeypatch.setattr("minimind.training.build.find_spec", lambda name: object())
    check_backend_installed(deepspeed_recipe())


class TestZero:
    pytestmark = slow

    @pytest.mark.parametrize("stage", [1, 2, 3])
    @pytest.mark.parametrize(
        "kind", ["pretrain", "moe", "lora", "dpo", "bf16", "clipped", "recompute"]
    )
    def test_losses_are_those_of_the_torch_backend(
        self, fork_server: ForkServer, tmp_path: Path, kind: str, stage: int
    ) -> None:
        """Two processes with two micro-batches per step, and validation."""
        objective = {"lora": "sft", "dpo": "dpo"}.get(kind, "pretrain")
        extra: dict[str, Any] = {"held_out": True, "validation__every": 4}
        extra |= {"moe": {"model__preset": "nano-moe"}, "lora": lora_settings()}.get(kind, {})
        extra |= {"training__precision": "bf16"} if kind == "bf16" else {}
        extra |= {"training__activation_checkpointing": kind == "recompute"}
        extra |= {"optim__grad_clip": 0.05} if kind == "clipped" else {}
        run_distributed(fork_server, tmp_path / "torch", 2, objective, **ADAMW | extra)
        run_distributed(fork_server, tmp_path / "zero", 2, objective, **zero(stage) | extra)
        assert samples_seen(tmp_path / "zero", 2) == list(range(32))
        for lines in ("train", "validation"):
            own, theirs = (metrics(tmp_path / name, lines) for name in ("torch", "zero"))
            assert [line.keys() for line in theirs] == [line.keys() for line in own]
            for name in ("loss", "grad_norm") if lines == "train" else ("loss",):
                values = [line[name] for line in theirs]
                close = 1e-3 if kind == "bf16" else 1e-5
                assert values == pytest.approx([line[name] for line in own], rel=close)

    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_stop_and_resume(self, fork_server: ForkServer, tmp_path: Path, stage: int) -> None:
        """The same bits with the same number of processes, the same losses with another number."""
        settings = zero(stage) | {"training__global_batch_size": 6, "training__steps": 12}
        uninterrupted, run, other = tmp_path / "uninterrupted", tmp_path / "run", tmp_path / "other"
        run_distributed(fork_server, uninterrupted, 2, **settings)
        run_distributed(fork_server, run, 2, stop=(1, 14), **settings)
        output = run_distributed(fork_server, run, 2, **settings)
        assert "resuming from step 4" in output
        assert checkpoint_files(run, 12) == checkpoint_files(uninterrupted, 12)
        assert metrics(run) == metrics(uninterrupted)
        samples = []
        for processes, stop in ((2, (1, 14)), (3, (2, 9)), (1, None)):
            run_distributed(fork_server, other, processes, stop=stop, **settings)
            samples += samples_seen(other, processes, batch=6)
        assert samples == list(range(72))
        assert losses(other) == pytest.approx(losses(uninterrupted), rel=1e-5)

    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_non_finite_step_changes_nothing(
        self, fork_server: ForkServer, tmp_path: Path, stage: int
    ) -> None:
        settings = zero(stage) | {"checkpoint__every": 1, "checkpoint__keep": 99}
        output = run_distributed(fork_server, tmp_path, 2, corrupt=(1, [9]), **settings)
        assert "step 5 (samples 16-19): non-finite gradient" in output
        assert (
            checkpoint_files(tmp_path, 5)
            == checkpoint_files(tmp_path, 4)
            != checkpoint_files(tmp_path, 6)
        )
        assert all(torch.tensor(losses(tmp_path)[5:]).isfinite())
        if stage < 3:
            assert_replicas_equal(tmp_path, 2)
