"""A GPU that is not there: training steps and decoding with tensors that say they are on one.

    python -m tests.support.fake_gpu training|inference|faults

prints {"work": how often it waits for the GPU}.

Torch's FakeTensorMode runs every operation on shapes and devices alone. One that mixes the GPU with
the CPU raises, and so does one whose shape depends on numbers; each number that is asked for
(`.item()`, `float()`, `if tensor`) is counted, for there a real GPU would be waited for.

Evidence, not proof: no kernel runs, and there is no autocast, no CUDA graph, no NCCL. Where the
code asks for "cuda" by name it takes the road of other devices, but for what `_as_on_cuda` mends.

In a build of torch without CUDA, tensors that pretend to be "cuda" or "mps" can go forward only:
with autograd the process aborts, for want of a device guard. So the GPU here is the device that
torch keeps for backends of others. That is made for a whole process: therefore this is a script.
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
    """Counts how often a number is asked for, and gives 1."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits = 0

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.waits += args[0].device.type == GPU
            return 1.0 if args[0].is_floating_point() else 1
        return super().dispatch(func, types, args, kwargs)


def _as_on_cuda() -> None:
    """What is not open to a device of others' backends and is to CUDA."""
    from minimind.model import experts

    made, adamw = torch.tensor, torch.optim.AdamW

    def tensor(data: Any, device: Any = None, **more: Any) -> torch.Tensor:
        found = made(data, **more)
        if device is None:
            return found
        found.constant = None  # torch would look for the numbers on the GPU  # type: ignore
        return found.to(device)

    torch.tensor = tensor  # type: ignore[assignment]
    torch.optim.AdamW = lambda *given, **more: adamw(  # type: ignore[assignment,misc]
        *given, **more | {"fused": True}
    )
    product = F.grouped_mm

    def grouped_mm(a: torch.Tensor, b: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        return product(a.bfloat16(), b.bfloat16(), offs=offs).to(a.dtype)  # fakes know no other

    F.grouped_mm = grouped_mm
    experts._has_grouped_products = lambda device, weight: device.type == GPU


def _moved(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """What `model.to` does, which cannot put fake tensors in the place of others."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            moved = torch.nn.Parameter(parameter.detach().to(GPU, dtype), parameter.requires_grad)
            setattr(module, name, moved)
    return model


def _to_gpu(batch: Any, device: torch.device) -> Any:
    """What the loop's `to_device` does; numbers are read where tensors still have them."""
    from minimind.training.batch import TensorPairs, to_device

    with unset_fake_temporarily():
        real = to_device(batch, torch.device("cpu"))
    parts = {name: part for name, part in vars(real).items() if isinstance(part, torch.Tensor)}
    moved = {name: torch.empty_like(part, device=device) for name, part in parts.items()}
    if real.pairs:
        moved["pairs"] = TensorPairs(
            *(torch.empty_like(part, device=device) for part in vars(real.pairs).values())
        )
    return replace(real, **moved)


def training() -> dict[str, Callable[[], int]]:
    """A step of each objective, and a validation; waits of the step alone."""
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
    from minimind.training import trainer as loop
    from minimind.training.batch import Prefetcher
    from minimind.training.metrics import MetricsLog
    from minimind.training.objectives.next_token import NextToken
    from minimind.training.precision import Precision
    from tests.support.small_runs import nano_trainer

    with tempfile.TemporaryDirectory() as run:
        trainer = nano_trainer(Path(run), objective, held_out=True, **settings)
    gpu, loop.to_device = torch.device(GPU), _to_gpu
    with FakeGPU() as mode:
        model = Transformer(trainer.model.config)
        model.activation_checkpointing = trainer.model.activation_checkpointing
        if trainer.recipe.lora:
            apply_lora(model, trainer.recipe.lora)
        trainer.model, trainer.device, trainer.precision = _moved(model), gpu, Precision("fp32", GPU)
        if isinstance(trainer.objective, NextToken):
            balance = trainer.recipe.training.router_aux_loss_coef
            trainer.objective = NextToken([1] * model.config.vocab_size, gpu, router_balance=balance)
        engine, at = loop._engine(trainer, trainer.model), loop._Progress()
        engine.set_lr(0.5)
        with closing(Prefetcher(trainer.data)) as batches:
            sums = loop._accumulate(trainer, engine, batches, at, lambda: False)
        assert sums is not None and mode.waits == 0, "nothing waits in the micro-batches"
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.device.type == GPU for p in trained)
        loop._step(trainer, engine, MetricsLog(Path(os.devnull)), at, sums)
        waits = mode.waits
        assert all(t.device.type == GPU for t in engine.state_tensors().values())
        validation = loop.validate(trainer, trainer.model)
        assert validation and at.interval.metrics(trainer.objective).keys() <= validation.keys()
    return waits


def inference() -> dict[str, Callable[[], int]]:
    """The engine's reading and writing of several texts, for every shape of model."""
    from tests.support.tiny import SHAPES

    def work(shape: str) -> Callable[[], int]:
        return lambda: _decode(**SHAPES[shape])

    return {shape: work(shape) for shape in SHAPES}


def _decode(**shape: Any) -> int:
    from minimind.inference.batched_model import BatchedModel, Part
    from minimind.model import PRESETS, ModelConfig, Transformer
    from tests.support.tiny import VOCAB, chunks_of, words

    with FakeGPU() as mode:
        config = ModelConfig(**PRESETS["nano"] | {"vocab_size": VOCAB} | shape)
        model = BatchedModel(_moved(Transformer(config), torch.bfloat16), 3, 256)
        first = model.forward([], [*chunks_of(0, words(90)), *chunks_of(2, words(64))])
        both = model.forward([Part(0, 90, [5]), Part(2, 64, [7])], chunks_of(1, words(3)))
        one = model.forward([Part(2, 65, [9])], [])
        assert {x.device.type for x in (first, both, one)} == {GPU}
        assert both.shape == (3, VOCAB) and one.shape == (1, VOCAB)
        return mode.waits


def faults() -> dict[str, Callable[[], int]]:
    """Each kind of fault: these raise, but for the last, which waits twice."""

    class OnTheCPU(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0] * torch.full(grads[0].shape, 2.0)

    def of(work: Callable[[torch.Tensor], Any]) -> Callable[[], int]:
        def run() -> int:
            with FakeGPU() as mode:
                work(torch.empty(3, 4, device=GPU, requires_grad=True))
                return mode.waits

        return run

    return {
        "left on the CPU": of(lambda x: x * torch.ones(3, 4)),
        "left there on the way back": of(lambda x: OnTheCPU.apply(x).sum().backward()),
        "a shape by numbers": of(lambda x: x[x > 0]),
        "numbers asked for": of(lambda x: float(x.detach().sum()) if x.sum() > 0 else 0.0),
    }


def main() -> None:
    """Do the work that is asked for; a fault is told by its name."""
    _setup_privateuseone_for_python_backend(GPU)
    # What `torch.autocast(…, enabled=False)` asks for.
    getattr(torch, GPU).get_amp_supported_dtype = lambda: [torch.bfloat16]
    _as_on_cuda()
    found: dict[str, int | str] = {}
    for name, work in {"training": training, "inference": inference, "faults": faults}[
        sys.argv[1]
    ]().items():
        try:
            found[name] = work()
        except Exception as error:
            if sys.argv[1] != "faults":
                raise
            found[name] = type(error).__name__
    print(json.dumps(found))


if __name__ == "__main__":
    main()
