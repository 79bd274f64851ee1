"""The parts together on an NVIDIA GPU, against the same on the CPU."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind.inference.batched_model import BatchedModel
from minimind.inference.capacity import CacheSizer, usable_bytes
from minimind.inference.engine import Engine
from minimind.inference.requests import Request
from minimind.inference.sampling import Sampling
from minimind.model.experts import moe, moe_reference
from minimind.model.varlen import supports_varlen
from minimind.tokenizer import Tokenizer
from minimind.training.precision import choose_precision
from tests.support.small_runs import nano_trainer
from tests.support.tiny import SHAPES, make_tiny, random_tokens

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def train(folder: Path, device: torch.device, objective: str, **settings: Any) -> list[float]:
    """Validate, then train 20 steps of the smallest model; return the loss of each step."""
    trainer = nano_trainer(folder, objective, held_out=True, **settings)
    trainer.model.to(device)
    trainer.validate_first = True
    trainer.device = trainer.batch_sizes.device = device
    trainer.precision = choose_precision(trainer.recipe.training.precision, device)
    if hasattr(trainer.objective, "_token_bytes"):
        trainer.objective._token_bytes = trainer.objective._token_bytes.to(device)
    trainer.train()
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [x["loss"] for x in map(json.loads, lines) if x["kind"] == "train"]


@pytest.mark.parametrize("preset", ["nano", "nano-moe"])
@pytest.mark.parametrize("objective", ["pretrain", "sft", "dpo"])
def test_losses_are_those_of_the_cpu(objective: str, preset: str, tmp_path: Path) -> None:
    settings = {"model__preset": preset}
    on_cpu = train(tmp_path / "cpu", torch.device("cpu"), objective, **settings)
    on_gpu = train(tmp_path / "gpu", CUDA, objective, **settings)
    assert len(on_gpu) == 20
    assert on_gpu[:5] == pytest.approx(on_cpu[:5], rel=1e-3)
    assert on_gpu[-1] == pytest.approx(on_cpu[-1], rel=0.05)
    supports_varlen.cache_clear()  # the first use is in validation, without gradients
    half = train(tmp_path / "bf16", CUDA, objective, training__precision="bf16", **settings)
    assert half[:5] == pytest.approx(on_cpu[:5], rel=0.02)
    assert supports_varlen(CUDA)


def test_activation_checkpointing_gives_the_same_losses(tmp_path: Path) -> None:
    settings = {"training__precision": "bf16"}
    stored = train(tmp_path / "stored", CUDA, "sft", **settings)
    settings["training__activation_checkpointing"] = True  # type: ignore[assignment]
    recomputed = train(tmp_path / "recomputed", CUDA, "sft", **settings)
    assert recomputed[:5] == pytest.approx(stored[:5], rel=1e-3)


@pytest.mark.filterwarnings("ignore")  # warnings of torch.compile itself
def test_a_compiled_model_gives_the_same_losses_on_packed_data(tmp_path: Path) -> None:
    settings = {"training__precision": "bf16"}
    plain = train(tmp_path / "plain", CUDA, "sft", **settings)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings["training__compile"] = True  # type: ignore[assignment]
    compiled = train(tmp_path / "compiled", CUDA, "sft", **settings)
    assert compiled[:5] == pytest.approx(plain[:5], rel=0.02)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_equal_the_reference(dtype: torch.dtype) -> None:
    """One expert has no rows."""
    x = torch.randn(200, 32, device=CUDA, requires_grad=True)
    chosen = torch.randint(0, 3, (200, 1), device=CUDA)
    chosen = torch.cat((chosen, (chosen + 1) % 3), 1)
    weights = torch.rand(200, 2, device=CUDA)
    matrices = [
        torch.randn(*shape, device=CUDA, requires_grad=True) / 6
        for shape in ((4, 128, 32), (4, 32, 64))
    ]
    leaves = [x, *matrices]
    expected = moe_reference(x, chosen, weights, *matrices)
    expected_grads = torch.autograd.grad(expected.square().sum(), leaves)
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        actual = moe(x, chosen, weights, *matrices)
    grads = torch.autograd.grad(actual.float().square().sum(), leaves)
    limit = 0.03 if dtype == torch.bfloat16 else 1e-4
    for a, b in zip((actual, *grads), (expected, *expected_grads), strict=True):
        assert (a - b).norm() <= limit * b.norm()


def test_the_engine_answers_as_on_the_cpu(tokenizer: Tokenizer) -> None:
    """Greedy, in float32, alone and in a batch, with CUDA graphs."""
    answers = []
    for device in ("cpu", "cuda"):
        model = make_tiny(**SHAPES["llama"]).to(device)
        with Engine(model, tokenizer, slots=3, context=200) as engine:
            requests = [
                Request(random_tokens(20 + 30 * seed, seed), Sampling(temperature=0), 30)
                for seed in range(4)
            ]
            results = dict(engine.generate(requests))
            assert engine._graphed_model._enabled == (device == "cuda")
            answers.append([results[index].token_ids for index in range(4)])
    assert answers[0] == answers[1]


def test_a_sampled_answer_is_finite_and_in_the_vocabulary(tokenizer: Tokenizer) -> None:
    model = make_tiny(torch.bfloat16).to(CUDA)
    with Engine(model, tokenizer, slots=2) as engine:
        sampling = replace(Sampling(), temperature=0.8, top_p=0.9)
        (_, result), *_ = engine.generate([Request(random_tokens(10), sampling, 20, seed=1)])
        assert result.error is None and len(result.token_ids) == 20
        assert all(0 <= token < tokenizer.vocab_size for token in result.token_ids)


def test_the_kv_cache_fits_into_free_memory() -> None:
    """The context is as long as the memory allows, not as the model does."""
    model = make_tiny(torch.bfloat16, max_position_embeddings=1 << 30).to(CUDA)
    free = usable_bytes([model])
    assert free
    usable = min(free, 1 << 30)
    sizer = CacheSizer(model, usable)
    size = sizer.size(4, 4, None)
    before = torch.cuda.memory_allocated()
    cache = BatchedModel(model, size.slots, size.context).cache
    allocated = cache.data.nbytes
    assert size.slots == 4 and cache.positions >= size.context
    assert allocated == sizer.bytes(4, size.context) <= torch.cuda.memory_allocated() - before
    assert 0.9 * usable < allocated <= usable
