"""`minimind doctor`: what this machine has, what will be used, what is missing."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind.cli import console
from minimind.cli.plan import size
from minimind.errors import install_line

if TYPE_CHECKING:
    import torch

    from minimind.planning.selftest import Check

# What an extra brings, the module that shows it is there, and the line that installs it.
_EXTRAS = {
    "web": ("the chat page", "streamlit"),
    "tensorboard": ("curves in TensorBoard", "tensorboard"),
    "wandb": ("tracking with Weights & Biases", "wandb"),
    "swanlab": ("tracking with SwanLab", "swanlab"),
    "hub": ("downloading exams", "huggingface_hub"),
    "lm-eval": ("tasks of EleutherAI's harness", "lm_eval"),
    "deepspeed": ("DeepSpeed's ZeRO", "deepspeed"),
}


def doctor(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    json: Annotated[Path | None, typer.Option("--json", help="Write it here too.")] = None,
) -> None:
    """Look at this machine: what it has, what will be used, what is missing, and a self-test.

    The exit status is 1 when the self-test fails.
    """
    found = _machine(device)
    console.show_metrics("This machine", found)
    extras = _missing_extras()
    if extras:
        rows = [(e["what"], e["install"]) for e in extras]
        console.show(console.table("Not installed", ["for", "install with"], rows))
    from minimind.planning.selftest import selftest

    checks = selftest(device)
    _show(checks)
    if json:
        console.write_json(
            json,
            {"machine": found, "missing": extras, "checks": [vars(check) for check in checks]},
        )
    if not all(check.passed for check in checks):
        raise typer.Exit(1)
    console.say("All is well. Begin with: minimind demo")


def _machine(device: str) -> dict[str, Any]:
    import os
    import platform
    import shutil

    import torch

    from minimind.inference.load import inference_dtype
    from minimind.model.device import choose_device, free_bytes
    from minimind.training.precision import choose_precision
    from minimind.version import __version__

    chosen = choose_device(device)
    free = free_bytes(chosen)
    found: dict[str, Any] = {
        "minimind": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "CUDA devices": torch.cuda.device_count(),
        "Apple MPS": torch.backends.mps.is_available(),
        "processor cores": os.cpu_count(),
        "threads of torch": torch.get_num_threads(),
        "free disk here": size(shutil.disk_usage(".").free),
        "device": str(chosen),
        "its free memory": "unknown" if free is None else size(free),
        "precision of training": choose_precision("auto", chosen).name,
        "precision of decoding": str(inference_dtype(chosen)).removeprefix("torch."),
        "batch invariance": _batch_invariance(chosen),
        "attention": "torch's scaled_dot_product_attention"
        + (", plain up to 256 tokens of training" if chosen.type == "cpu" else ""),
        "C++ compiler, for training.compile": _compiler() or "none",
    }
    if chosen.type == "cuda":
        properties = torch.cuda.get_device_properties(chosen)
        capability = f"{properties.major}.{properties.minor}"
        found["GPU"] = f"{properties.name}, {size(properties.total_memory)}, sm {capability}"
    return found


def _batch_invariance(device: "torch.device") -> str:
    """Whether answers depend on other requests here, tried with a model of the preset `small`."""
    import torch

    from minimind.inference.batched_model import BatchedModel
    from minimind.inference.load import inference_dtype
    from minimind.model import PRESETS, ModelConfig, Transformer

    with torch.device(device):
        model = Transformer(ModelConfig(**PRESETS["small"], vocab_size=6400))
    return BatchedModel(model.to(inference_dtype(device)), slots=16, context=512).invariance_note


def _compiler() -> str | None:
    import os
    import shutil

    names = (os.environ.get("CXX"), "c++", "g++", "clang++", "cl")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _missing_extras() -> list[dict[str, str]]:
    from importlib.util import find_spec

    return [
        {"what": what, "install": install_line(extra)}
        for extra, (what, module) in _EXTRAS.items()
        if find_spec(module) is None
    ]


def _show(checks: "list[Check]") -> None:
    rows = [
        (check.name, "passed" if check.passed else "FAILED", f"{check.seconds:.1f} s", check.note)
        for check in checks
    ]
    console.show(console.table("Self-test", ["what", "", "time", ""], rows))
