"""A simulated GPU: training steps and decoding with fake tensors on a device that does not exist.

    python -m tests.support.fake_gpu training inference faults

prints the number of device synchronizations: {KIND: {WORK: number}}.

Torch's FakeTensorMode propagates only the shape and device of each tensor. An operation that mixes
GPU and CPU tensors raises an error, and so does one whose output shape depends on values. Each
value that is read (`.item()`, `float()`, `if tensor`) is counted, since it would synchronize a real
GPU.

This is evidence, not proof: no kernel runs, and there is no autocast, no CUDA graph and no NCCL.
Code that tests for "cuda" by name takes the branch of other devices, except for what `_as_on_cuda`
patches.

In a build of torch without CUDA, fake tensors on "cuda" or "mps" can only go forward: autograd
aborts the process, because there is no device guard. The device is therefore the one that torch
reserves for external backends (PrivateUse1). It is registered per process, which is why this is a
script.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

GPU = "fakegpu"


class FakeGPU(FakeTensorMode):
    """Counts the values that are read from the device, and returns 1 for each."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.syncs = 0

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.syncs += args[0].device.type == GPU
            return 1.0 if args[0].is_floating_point() else 1
        return super().dispatch(func, types, args, kwargs)


def _as_on_cuda() -> None:
    """Patch what torch supports on CUDA and not on external backends."""
    from minimind.model import experts

    real_tensor, adamw = torch.tensor, torch.optim.AdamW

    def tensor(data: Any, device: Any = None, **options: Any) -> torch.Tensor:
        result = real_tensor(data, **options)
        if device is None:
            return result
        result.constant = None  # torch would read the values on the GPU  # type: ignore
        return result.to(device)

    torch.tensor = tensor  # type: ignore[assignment]
    torch.optim.AdamW = lambda *arguments, **options: adamw(  # type: ignore[assignment,misc]
        *arguments, **options | {"fused": True}
    )
    real_grouped_mm = F.grouped_mm

    def grouped_mm(a: torch.Tensor, b: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        # Fake tensors only support bf16 here.
        return real_grouped_mm(a.bfloat16(), b.bfloat16(), offs=offs).to(a.dtype)

    F.grouped_mm = grouped_mm
    experts._supports_grouped_mm = lambda rows, weight: rows.device.type == GPU


def _move(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Do what `model.to` does, which cannot replace tensors by fake ones."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            on_gpu = torch.nn.Parameter(parameter.detach().to(GPU, dtype), parameter.requires_grad)
            setattr(module, name, on_gpu)
    return model


def _to_gpu(batch: Any, device: torch.device) -> Any:
    """Do what `to_device` does; reading values needs the real tensors."""
    from minimind.training.batch import TensorPairs, to_device

    with unset_fake_temporarily():
        real = to_device(batch, torch.device("cpu"))
    tensors = {name: x for name, x in vars(real).items() if isinstance(x, torch.Tensor)}
    on_gpu = {name: torch.empty_like(x, device=device) for name, x in tensors.items()}
    if real.pairs:
        on_gpu["pairs"] = TensorPairs(
            *(torch.empty_like(x, device=device) for x in vars(real.pairs).values())
        )
    return replace(real, **on_gpu)


def training() -> dict[str, Callable[[], int]]:
    """Run a step of each objective and a validation; count the synchronizations of the step."""
    from tests.support.small_runs import lora_settings

    return {
        "pretrain": lambda: _step("pretrain"),
        "adamw": lambda: _step("pretrain", optim__name="adamw"),
        "experts": lambda: _step("pretrain", model__preset="nano-moe"),
        "checkpointing": lambda: _step("pretrain", training__activation_checkpointing=True),
        "sft": lambda: _step("sft"),
        "lora": lambda: _step("sft", **lora_settings()),
        "dpo": lambda: _step("dpo"),
        "dpo of experts": lambda: _step("dpo", model__preset="nano-moe"),
    }


def _step(objective: str, **settings: Any) -> int:
    from minimind.model import Transformer, apply_lora
    from minimind.training import trainer as trainer_module
    from minimind.training import validation
    from minimind.training.backend import create_backend
    from minimind.training.batch import Prefetcher
    from minimind.training.metrics import MetricsLog
    from minimind.training.objectives.next_token import NextToken
    from minimind.training.precision import Precision
    from tests.support.small_runs import nano_trainer

    with tempfile.TemporaryDirectory() as run:
        trainer = nano_trainer(Path(run), objective, held_out=True, **settings)
    gpu = torch.device(GPU)
    trainer_module.to_device = validation.to_device = _to_gpu
    with FakeGPU() as mode:
        model = Transformer(trainer.model.config)
        model.activation_checkpointing = trainer.model.activation_checkpointing
        if trainer.recipe.lora:
            apply_lora(model, trainer.recipe.lora)
        trainer.model = trainer._compiled = _move(model)
        trainer.device = trainer.batch_sizes.device = gpu
        trainer.precision = Precision("fp32", GPU)
        if isinstance(trainer.objective, NextToken):
            trainer.objective = NextToken(
                [1] * model.config.vocab_size,
                gpu,
                router_aux_loss_coef=trainer.recipe.training.router_aux_loss_coef,
            )
        trainer.metrics_log = MetricsLog(Path(os.devnull))
        backend = trainer.backend = create_backend(
            model, model, trainer.recipe, trainer.objective, trainer.precision, trainer.group
        )
        backend.set_lr(0.5)
        with closing(Prefetcher(trainer.data)) as trainer._prefetcher:
            sums = trainer.accumulate_gradients()
        assert sums is not None and mode.syncs == 0, "micro-batches do not synchronize"
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.device.type == GPU for p in trained)
        trainer.optimizer_step(sums)
        syncs = mode.syncs
        assert all(t.device.type == GPU for t in backend.state_tensors().values())
        metrics = trainer.compute_validation_metrics()
        training_metrics = trainer.state.interval.metrics(trainer.objective)
        assert metrics and training_metrics.keys() <= metrics.keys()
    return syncs


def inference() -> dict[str, Callable[[], int]]:
    """Prefill and decode several sequences, for every shape of model."""
    from tests.support.tiny import SHAPES

    def work(shape: str) -> Callable[[], int]:
        return lambda: _decode(**SHAPES[shape])

    return {shape: work(shape) for shape in SHAPES}


def _decode(**shape: Any) -> int:
    from minimind.inference.batched_model import BatchedModel, Part
    from minimind.model import PRESETS, ModelConfig, Transformer
    from tests.support.tiny import VOCAB, chunks_of, random_tokens

    with FakeGPU() as mode:
        config = ModelConfig(**PRESETS["nano"] | {"vocab_size": VOCAB} | shape)
        model = BatchedModel(_move(Transformer(config), torch.bfloat16), 3, 256)
        first = model.forward(
            [], [*chunks_of(0, random_tokens(90)), *chunks_of(2, random_tokens(64))]
        )
        both = model.forward([Part(0, 90, [5]), Part(2, 64, [7])], chunks_of(1, random_tokens(3)))
        one = model.forward([Part(2, 65, [9])], [])
        assert {x.device.type for x in (first, both, one)} == {GPU}
        assert both.shape == (3, VOCAB) and one.shape == (1, VOCAB)
        return mode.syncs


def faults() -> dict[str, Callable[[], int]]:
    """Run each kind of fault: all raise an error except the last, which synchronizes twice."""

    class OnTheCPU(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0] * torch.full(grads[0].shape, 2.0)

    def on_gpu(work: Callable[[torch.Tensor], Any]) -> Callable[[], int]:
        def run() -> int:
            with FakeGPU() as mode:
                work(torch.empty(3, 4, device=GPU, requires_grad=True))
                return mode.syncs

        return run

    return {
        "CPU tensor in forward": on_gpu(lambda x: x * torch.ones(3, 4)),
        "CPU tensor in backward": on_gpu(lambda x: OnTheCPU.apply(x).sum().backward()),
        "shape that depends on values": on_gpu(lambda x: x[x > 0]),
        "values read": on_gpu(lambda x: float(x.detach().sum()) if x.sum() > 0 else 0.0),
    }


def main() -> None:
    """Run the kinds of work that the command line names; report faults by their error's name."""
    _setup_privateuseone_for_python_backend(GPU)
    # `torch.autocast(…, enabled=False)` calls it.
    getattr(torch, GPU).get_amp_supported_dtype = lambda: [torch.bfloat16]
    _as_on_cuda()
    kinds = {"training": training, "inference": inference, "faults": faults}
    results: dict[str, dict[str, int | str]] = {}
    for kind in sys.argv[1:]:
        results[kind] = {}
        for name, work in kinds[kind]().items():
            try:
                results[kind][name] = work()
            except Exception as error:
                if kind != "faults":
                    raise
                results[kind][name] = type(error).__name__
    print(json.dumps(results))


if __name__ == "__main__":
    main()
