"""Row 9 of the reliability promises: the losses of 50 steps stay what they are.

    python tests/training/test_golden.py --write    after a change that is meant to change them

Exact on the kind of machine that wrote them, on others as close as float32's rounding allows.
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
    """What decides the last bits of a sum."""
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "processor": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    } | {switch: os.environ[switch] for switch in SWITCHES if switch in os.environ}


def processor() -> str:
    """Maker, family and model where the system tells: kernels are chosen by them."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    told = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in told.items()}
    return " ".join(fields.get(key, "") for key in ("vendor_id", "cpu family", "model"))


def curve(run: Path, objective: str) -> list[float]:
    kind = "sft" if objective == "lora" else objective.removesuffix("-moe")
    settings = lora_settings(optim__lr=0.01) if objective == "lora" else {}
    preset = "nano-moe" if objective.endswith("-moe") else "nano"
    nano_trainer(run, kind, training__steps=STEPS, model__preset=preset, **settings).train()
    return losses(run)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_are_those_that_were_written_down(tmp_path: Path, objective: str) -> None:
    golden = json.loads((FOLDER / f"{objective}.json").read_text("utf-8"))
    found = curve(tmp_path, objective)
    assert len(found) == len(golden["losses"]) == STEPS
    if machine() == golden["on"]:
        assert found == golden["losses"]
    else:
        # As a share of its length, the path of the weights is off by what the gradients are; and
        # the losses, which have fallen by less than their size, by that share.
        model = ModelConfig(**PRESETS["nano-moe"], vocab_size=VOCAB)
        close = gradient_rounding(model, positions=32, tokens=4 * 32)
        assert found == pytest.approx(golden["losses"], rel=close)


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
