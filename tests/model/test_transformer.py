from collections.abc import Callable

import pytest
import torch

from minimind.config.settings import LoRASettings
from minimind.model import PRESETS, KVCache, ModelConfig, Transformer, apply_lora
from minimind.model.experts import Routing
from minimind.training.precision import Precision

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize(
    ("preset", "count"),
    [("small", 26_878_464), ("base", 108_749_568), ("nano", 223_392), ("moe", 113_402_368)],
)
def test_parameter_counts(preset: str, count: int) -> None:
    with torch.device("meta"):
        model = Transformer(ModelConfig(**PRESETS[preset]))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_active_parameters_are_those_of_a_dense_model_of_the_active_width() -> None:
    shape = PRESETS["small"] | {"intermediate_size": 5632}
    with torch.device("meta"):
        moe, dense = Transformer(ModelConfig(**PRESETS["moe"])), Transformer(ModelConfig(**shape))
    routers = 8 * 4 * 512
    assert moe.num_active_parameters == dense.num_active_parameters + routers
    assert dense.num_active_parameters == sum(p.numel() for p in dense.parameters())


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("nano", {}),
        ("nano", {"qk_norm": True}),
        ("nano-moe", {}),
        ("nano-moe", {"attention_multiplier": 0.3, "residual_multiplier": 0.5}),
    ],
)
@torch.inference_mode()
def test_decoding_with_a_cache_gives_the_same_hidden_states(
    random_model: Callable[..., Transformer], preset: str, changes: dict[str, float]
) -> None:
    model = random_model(preset, **changes)
    tokens = torch.randint(600, (3, 40))
    expected = model(tokens)
    cache = KVCache(model.config, 3, 40, device=tokens.device, dtype=torch.float32)
    parts = [model(part, cache=cache) for part in tokens.split([7, 1, 1, 12, 1, 18], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-4)
    assert cache.length == 40


def test_a_cache_gives_the_same_while_gradients_are_recorded(
    random_model: Callable[..., Transformer],
) -> None:
    model, tokens = random_model("nano"), torch.randint(600, (2, 20))
    cache = KVCache(model.config, 2, 20, device=tokens.device, dtype=torch.float32)
    parts = [model(part, cache=cache) for part in tokens.split([7, 13], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("preset", ["nano", "nano-moe"])
@pytest.mark.parametrize("training", [False, True])
def test_conversations_in_a_packed_sequence_do_not_attend_to_each_other(
    random_model: Callable[..., Transformer], training: bool, preset: str
) -> None:
    model = random_model(preset)
    tokens = torch.randint(600, (2, 30))
    lengths = [[5, 24, 1], [11, 11, 8]]
    segments = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in lengths])
    with torch.set_grad_enabled(training):
        packed = model(tokens, segments=segments)
        for row, sizes in enumerate(lengths):
            single = [model(part[None])[0] for part in tokens[row].split(sizes)]
            torch.testing.assert_close(packed[row], torch.cat(single), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(packed, model(tokens), atol=1e-2)


@pytest.mark.parametrize(
    ("preset", "changes"), [("nano", {}), ("nano-moe", {"attention_multiplier": 0.3})]
)
def test_attention_in_training_and_inference_agree(
    random_model: Callable[..., Transformer], preset: str, changes: dict[str, float]
) -> None:
    """On a CPU, training uses `_blockwise_attention` and inference PyTorch's kernel."""
    model = random_model(preset, **changes)
    tokens = torch.randint(600, (2, 40))
    trained = model(tokens)
    assert trained.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(trained.detach(), model(tokens), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_bfloat16_is_close_to_float32_without_warnings(
    random_model: Callable[..., Transformer],
) -> None:
    model = random_model("nano")
    tokens = torch.randint(600, (2, 40))
    exact = model.logits(model(tokens))
    bf16 = model.bfloat16().logits(model(tokens)).float()
    assert (bf16 - exact).abs().mean() < 0.05 * exact.std()


@torch.inference_mode()
def test_a_long_context_takes_no_memory_until_it_is_used(
    random_model: Callable[..., Transformer],
) -> None:
    model = random_model("nano", max_position_embeddings=10**12)
    assert model(torch.randint(600, (1, 5))).isfinite().all()


@torch.inference_mode()
def test_attention_is_causal(
    random_model: Callable[..., Transformer],
) -> None:
    model = random_model("nano")
    tokens = torch.randint(600, (1, 20))
    changed = tokens.clone()
    changed[0, 12] = (tokens[0, 12] + 1) % 600
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert (before[:, 12:] - after[:, 12:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("shape", ["nano", "nano-moe"])
@pytest.mark.parametrize(("adapters", "half"), [(False, False), (True, False), (False, True)])
def test_activation_checkpointing_gives_identical_bits(
    shape: str, adapters: bool, half: bool
) -> None:
    tokens = torch.randint(0, 50, (2, 16))
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(**(PRESETS[shape] | {"vocab_size": 50}))).train()
        if adapters:  # dropout draws the same numbers when it is computed again
            apply_lora(model, LoRASettings(dropout=0.5))
        model.activation_checkpointing = checkpointing
        routing = Routing() if shape == "nano-moe" else None
        torch.manual_seed(1)
        with Precision("bf16" if half else "fp32", "cpu").autocast():
            loss = model.logits(model(tokens, routing=routing)).float().square().mean()
        for logits in routing.logits if routing else ():  # as the balance loss uses them
            loss = loss + logits.square().mean()
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        results.append([loss.detach(), *(p.grad for p in trained if p.grad is not None)])
        assert len(results[-1]) == len(trained) + 1
    assert all(map(torch.equal, *results))
