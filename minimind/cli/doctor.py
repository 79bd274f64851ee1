"""`minimind doctor`: describe this machine, list missing extras, run a self-test."""

from typing import TYPE_CHECKING, Any

import typer

from minimind.cli import console
from minimind.cli.options import Device, Json
from minimind.errors import install_line
from minimind.files import write_json

if TYPE_CHECKING:
    import torch

    from minimind.planning.selftest import Check

# Extra -> its purpose and the module that it installs.
_EXTRAS = {
    "web": ("the web chat page", "streamlit"),
    "tensorboard": ("experiment tracking with TensorBoard", "tensorboard"),
    "wandb": ("experiment tracking with Weights & Biases", "wandb"),
    "swanlab": ("experiment tracking with SwanLab", "swanlab"),
    "remote": ("remote models in eval and compare", "openai"),
    "onnx": ("ONNX export", "onnxscript"),
    "lm-eval": ("tasks of the EleutherAI evaluation harness", "lm_eval"),
    "push": ("`push` to Hugging Face and ModelScope", "modelscope_hub"),
    "llama-cpp": ("K-quants in `export gguf`", "llama_cpp"),
    "deepspeed": ("DeepSpeed ZeRO", "deepspeed"),
    "ray": ("`data prepare` on several machines", "ray"),
}


def doctor(
    device: Device = "auto",
    json: Json = None,
) -> None:
    """Describe this machine, and run a self-test of training.

    Lists missing extras too. The exit status is 1 if the self-test fails.
    """
    machine = _machine(device)
    console.show_metrics("This machine", machine)
    extras = _missing_extras()
    if extras:
        rows = [(extra["purpose"], extra["install"]) for extra in extras]
        console.show(console.table("Not installed", ["purpose", "install with"], rows))
    from minimind.planning.selftest import selftest

    checks = selftest(device)
    _show(checks)
    if json:
        write_json(
            json,
            {"machine": machine, "missing": extras, "checks": [vars(check) for check in checks]},
        )
    if not all(check.passed for check in checks):
        raise typer.Exit(1)
    console.say("Everything works. Begin with: minimind demo")


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
    machine: dict[str, Any] = {
        "minimind": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "CUDA devices": torch.cuda.device_count(),
        "Apple MPS": torch.backends.mps.is_available(),
        "CPU cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "free disk space": console.format_size(shutil.disk_usage(".").free),
        "device": str(chosen),
        "free memory of the device": "unknown" if free is None else console.format_memory(free),
        "training precision": choose_precision("auto", chosen).name,
        "decoding precision": str(inference_dtype(chosen)).removeprefix("torch."),
        "training on a CPU": _cpu_training(),
        "decoding on a CPU": _cpu_decoding(),
        "batch invariance": _batch_invariance(chosen),
        "attention": "torch.nn.functional.scaled_dot_product_attention"
        + _training_attention(chosen),
        "C++ compiler": _compiler() or "none",
    }
    if chosen.type == "cuda":
        properties = torch.cuda.get_device_properties(chosen)
        memory = console.format_memory(properties.total_memory)
        capability = f"{properties.major}.{properties.minor}"
        machine["GPU"] = f"{properties.name}, {memory}, sm {capability}"
    return machine


def _training_attention(device: "torch.device") -> str:
    """Return what training uses instead, as the end of a sentence."""
    from minimind.model.varlen import supports_varlen

    if device.type == "cpu":
        return ", in training explicit up to 256 tokens, or compiled code"
    if supports_varlen(device):
        return ", variable-length for packed sequences in bf16 and fp16"
    return ", with a dense mask for packed sequences"


def _cpu_training() -> str:
    from minimind.model.fused import unavailable_reason

    reason = unavailable_reason()
    return "compiled code in bf16" if reason is None else f"torch, slower: {reason}"


def _cpu_decoding() -> str:
    from minimind.inference.native_library import unavailable_reason

    reason = unavailable_reason()
    return "compiled code" if reason is None else f"torch, slower: {reason}"


def _batch_invariance(device: "torch.device") -> str:
    """Describe the batch invariance of inference on a device, tested with preset `small`."""
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
        {"purpose": purpose, "install": install_line(extra)}
        for extra, (purpose, module) in _EXTRAS.items()
        if find_spec(module) is None
    ]


def _show(checks: "list[Check]") -> None:
    rows = [
        (check.name, "passed" if check.passed else "FAILED", f"{check.seconds:.1f} s", check.note)
        for check in checks
    ]
    console.show(console.table("Self-test", ["check", "result", "time", "note"], rows))
