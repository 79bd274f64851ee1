"""The losses of 50 steps are the recorded ones.

    python tests/training/test_golden.py --write    record new ones, after an intended change

The bits must be equal on the kind of machine that recorded them. On other machines the tolerance
is the rounding error of float32.
"""

import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind.model import PRESETS, ModelConfig
from tests.support.rounding import gradient_rounding
from tests.support.small_runs import VOCAB, lora_settings, losses, nano_trainer

pytestmark = pytest.mark.numeric

FOLDER = Path(__file__).parent / "golden"
STEPS = 50
SWITCHES = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")  # to other kernels
OBJECTIVES = ("pretrain", "sft", "dpo", "pretrain-moe", "lora")


def machine() -> dict[str, Any]:
    """Return what the last bits of a sum depend on."""
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "processor": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    } | {switch: os.environ[switch] for switch in SWITCHES if switch in os.environ}


def processor() -> str:
    """Return vendor, family and model, by which libraries choose kernels; "" where unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    entries = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in entries.items()}
    return " ".join(fields.get(key, "") for key in ("vendor_id", "cpu family", "model"))


def curve(run: Path, objective: str) -> list[float]:
    kind = "sft" if objective == "lora" else objective.removesuffix("-moe")
    settings = lora_settings(optim__lr=0.01) if objective == "lora" else {}
    preset = "nano-moe" if objective.endswith("-moe") else "nano"
    nano_trainer(run, kind, training__steps=STEPS, model__preset=preset, **settings).train()
    return losses(run)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_equal_the_recorded_ones(tmp_path: Path, objective: str) -> None:
    golden = json.loads((FOLDER / f"{objective}.json").read_text("utf-8"))
    curve_losses = curve(tmp_path, objective)
    assert len(curve_losses) == len(golden["losses"]) == STEPS
    if machine() == golden["on"]:
        assert curve_losses == golden["losses"]
    else:
        # The relative error of the weights is that of the gradients. The losses fell by less than
        # their value, so their relative error is no larger.
        model = ModelConfig(**PRESETS["nano-moe"], vocab_size=VOCAB)
        close = gradient_rounding(model, positions=32, tokens=4 * 32)
        assert curve_losses == pytest.approx(golden["losses"], rel=close)


def write() -> None:
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for objective in OBJECTIVES:
        with tempfile.TemporaryDirectory() as run:
            golden = {"on": machine(), "losses": curve(Path(run), objective)}
        path = FOLDER / f"{objective}.json"
        path.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    write()
