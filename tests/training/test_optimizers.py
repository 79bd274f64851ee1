import copy
from typing import Any

import pytest
import torch
from torch import nn

from minimind.config.model import PRESETS, ModelConfig
from minimind.config.settings import OptimSettings
from minimind.errors import CheckpointError
from minimind.model import Transformer
from minimind.training.optimizers import Muon, Optimizers, orthogonalize

pytestmark = pytest.mark.numeric


def nano(**shape: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**(PRESETS["nano"] | {"vocab_size": 97} | shape)))


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def matrices(*shapes: tuple[int, int]) -> list[nn.Parameter]:
    torch.manual_seed(1)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64), (1, 8), (8, 1)])
def test_orthogonalised_matrices_keep_their_directions_with_singular_values_near_one(
    shape: tuple[int, int],
) -> None:
    torch.manual_seed(2)
    left, values, right = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    spread = torch.linspace(0.05, 1.0, values.shape[-1])
    for matrix, nearest in zip(orthogonalize(left * spread @ right), left @ right, strict=True):
        found = torch.linalg.svdvals(matrix)
        assert found.min() > 0.6 and found.max() < 1.3
        assert torch.cosine_similarity(matrix.flatten(), nearest.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("shape", [(48, 48), (96, 40), (40, 56), (40, 96), (1, 8), (24, 400)])
def test_orthogonalising_is_a_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    """Against singular values in float64; a Gram matrix has their squares, and loses of small ones
    what is still a hundredth of bf16's rounding."""
    generator = torch.Generator().manual_seed(5)
    rank = min(shape)
    given = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(given, full_matrices=False)
    # Even; over four orders of magnitude; and with three that matter, as gradients often are.
    spread = torch.logspace(0, -4, rank, dtype=torch.float64)
    few = torch.full_like(spread, 1e-5)
    few[:3] = 1
    values = torch.stack([values[0], spread, few])
    wanted = values / values.norm(dim=-1, keepdim=True)
    for _ in range(5):
        wanted = 3.4445 * wanted - 4.7750 * wanted**3 + 2.0315 * wanted**5
    found = orthogonalize((left * values[:, None] @ right).float())
    assert found.dtype == torch.float32
    exact = left * wanted[:, None] @ right
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-4)


def test_a_last_bit_of_a_gradient_stays_one() -> None:
    """What bf16 would make 1e-3 of, and another number of processes then another run."""
    generator = torch.Generator().manual_seed(6)
    for shape in ((64, 64), (64, 176), (176, 64)):
        given = torch.randn(2, *shape, generator=generator)
        bits = torch.randint(-1, 2, given.shape, generator=generator) * torch.finfo().eps
        found, other = orthogonalize(given), orthogonalize(given * (1 + bits))
        assert (found - other).norm() < 2e-6 * found.norm()


def test_a_matrix_without_a_gradient_is_not_made_one() -> None:
    assert not orthogonalize(torch.zeros(2, 4, 8)).any()


def test_matrices_together_are_as_one_by_one() -> None:
    torch.manual_seed(3)
    given = torch.randn(5, 24, 40)
    together = orthogonalize(given)
    single = torch.cat([orthogonalize(matrix[None]) for matrix in given])
    torch.testing.assert_close(together, single, rtol=0, atol=1e-5)


def test_muon_is_that_of_torch() -> None:
    """Same hyper-parameters, same steps, to the rounding of the bf16 that theirs is in."""
    settings = OptimSettings(muon_lr=0.02, momentum=0.9, weight_decay=0.1)
    shapes = ((48, 16), (16, 48), (32, 32), (32, 32), (48, 16))
    ours, theirs = matrices(*shapes), matrices(*shapes)
    before = [p.detach().clone() for p in ours]
    muon = Muon(ours, settings)
    reference = torch.optim.Muon(
        theirs, lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True, adjust_lr_fn="original"
    )
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        muon.step()
        reference.step()
    for one, other, start in zip(ours, theirs, before, strict=True):
        torch.testing.assert_close(
            muon.buffers[one], reference.state[other]["momentum_buffer"], rtol=1e-5, atol=1e-6
        )
        moved = (other - start).norm()
        assert (one - other).norm() < 0.01 * moved
        assert moved > 0.05


def test_adamw_is_that_of_torch_and_decays_matrices_alone() -> None:
    settings = OptimSettings(name="adamw", lr=0.01, weight_decay=0.5, beta1=0.8, eps=1e-6)
    model = nano(qk_norm=True)
    reference = copy.deepcopy(model)
    decays = [p for p in reference.parameters() if p.ndim == 2]
    plain = [p for p in reference.parameters() if p.ndim == 1]
    assert len(plain) == 1 + 2 * 4  # the norms: the last, and in a layer two and two for q and k
    groups = [{"params": decays, "weight_decay": 0.5}, {"params": plain, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, settings.beta2), eps=1e-6)
    ours = Optimizers(model, settings)
    for step in range(3):
        give_gradients(model, step)
        give_gradients(reference, step)
        ours.step()
        theirs.step()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_norms_do_not_decay() -> None:
    model = nano()
    optimizers = Optimizers(model, OptimSettings(weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step()
    for name, parameter in model.named_parameters():
        shrunk = (parameter.abs() < before[name].abs()).any()
        assert bool(shrunk) == (parameter.ndim == 2), name


def test_muon_has_the_matrices_of_the_layers_and_adamw_the_rest() -> None:
    model = nano(tie_word_embeddings=False)
    state = Optimizers(model, OptimSettings(name="muon")).state_tensors()
    by_muon = {name.removeprefix("momentum/") for name in state if name.startswith("momentum/")}
    by_adamw = {name.removeprefix("exp_avg/") for name in state if name.startswith("exp_avg/")}
    assert by_muon == {
        f"model.layers.{layer}.{part}_proj.weight"
        for layer in (0, 1)
        for part in (
            *("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"),
            *("mlp.gate", "mlp.up", "mlp.down"),
        )
    }
    assert by_muon | by_adamw == {name for name, _ in model.named_parameters()}
    assert not by_muon & by_adamw
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= by_adamw


def test_each_expert_goes_through_muon_on_its_own_and_gate_and_up_apart() -> None:
    """As if each were a parameter of its own, which they are in a dense model."""
    shapes = {"experts": (3, 32, 12), "down": (3, 12, 16), "shared": (32, 12)}
    torch.manual_seed(4)
    ours = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    settings = OptimSettings(muon_lr=0.02, weight_decay=0.1)
    muon = Muon(ours.values(), settings, fused=[ours["experts"], ours["shared"]])

    def parts(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        halves = [half for expert in tensors["experts"] for half in expert.chunk(2)]
        return [*halves, *tensors["down"], *tensors["shared"].chunk(2)]

    single = [nn.Parameter(part.detach().clone()) for part in parts(ours)]
    alone = Muon(single, settings)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        gradients = {
            name: torch.randn(shape, generator=generator) for name, shape in shapes.items()
        }
        for name, parameter in ours.items():
            parameter.grad = gradients[name].clone()
        for parameter, gradient in zip(single, parts(gradients), strict=True):
            parameter.grad = gradient.clone()
        muon.step()
        alone.step()
    assert len(single) == 11
    for wanted, found in zip(single, parts(ours), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_the_experts_of_a_model_are_fused_or_not_as_their_names_say() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**(PRESETS["nano-moe"] | {"vocab_size": 97})))
    optimizers = Optimizers(model, OptimSettings())
    assert optimizers._muon is not None
    names = {parameter: name for name, parameter in model.named_parameters()}
    router = "model.layers.0.block_sparse_moe.router.layer.weight"
    assert f"exp_avg/{router}" in optimizers.state_tensors()  # AdamW's
    rows = {
        names[p].removeprefix("model.layers.0."): rows
        for (_, rows), group in optimizers._muon.groups.items()
        for p in group
        if ".layers.0." in names[p]
    }
    assert rows == {
        **{
            f"self_attn.{part}_proj.weight": size
            for part, size in zip("qkvo", (32, 16, 16, 32), strict=True)
        },
        "block_sparse_moe.input_linear.weight": 16,
        "block_sparse_moe.output_linear.weight": 32,
        "shared_mlp.input_linear.weight": 32,
        "shared_mlp.output_linear.weight": 32,
    }


def test_what_is_frozen_stays_and_has_no_state() -> None:
    model = nano()
    model.model.embed_tokens.requires_grad_(False)
    optimizers = Optimizers(model, OptimSettings())
    assert not any("embed_tokens" in name for name in optimizers.state_tensors())
    before = model.model.embed_tokens.weight.clone()
    give_gradients(model, 0)
    optimizers.step()
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_learning_rates_are_shares_of_their_peaks() -> None:
    optimizers = Optimizers(nano(), OptimSettings(lr=0.5, muon_lr=0.25))
    assert optimizers.lrs() == {"adamw": 0.5, "muon": 0.25}
    optimizers.set_lr(0.5)
    assert optimizers.lrs() == {"adamw": 0.25, "muon": 0.125}
    model = nano()
    before = [p.detach().clone() for p in model.parameters()]
    optimizers = Optimizers(model, OptimSettings())
    optimizers.set_lr(0.0)
    give_gradients(model, 0)
    optimizers.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_state_goes_on_where_it_was(name: str) -> None:
    """Three steps and one more are four steps, bit for bit."""
    settings = OptimSettings(name=name)  # type: ignore[arg-type]
    model = nano()
    optimizers = Optimizers(model, settings)
    assert all(not tensor.any() for tensor in optimizers.state_tensors().values())
    for step in range(3):
        give_gradients(model, step)
        optimizers.step()
    other = copy.deepcopy(model)
    others = Optimizers(other, settings)
    saved = {key: tensor.clone() for key, tensor in optimizers.state_tensors().items()}
    others.load_state_tensors(saved)
    for one, its in ((model, optimizers), (other, others)):
        give_gradients(one, 3)
        its.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    state = optimizers.state_tensors()
    assert all(torch.equal(state[key], tensor) for key, tensor in others.state_tensors().items())


def test_the_state_of_another_model_or_optimizer_is_refused() -> None:
    optimizers = Optimizers(nano(), OptimSettings())
    good = optimizers.state_tensors()
    key = next(iter(good))
    strangers = [
        {},
        {k: v for k, v in good.items() if k != key},
        good | {"more": torch.zeros(1)},
        good | {key: torch.zeros(3, 5)},
        Optimizers(nano(), OptimSettings(name="adamw")).state_tensors(),
        Optimizers(nano(num_hidden_layers=3), OptimSettings()).state_tensors(),
    ]
    for state in strangers:
        with pytest.raises(CheckpointError, match="belongs to another model or optimizer"):
            optimizers.load_state_tensors(state)


def test_gradients_are_forgotten() -> None:
    model = nano()
    optimizers = Optimizers(model, OptimSettings())
    give_gradients(model, 0)
    optimizers.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
