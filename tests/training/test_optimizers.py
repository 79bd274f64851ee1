import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minimind.config.model import PRESETS, ModelConfig
from minimind.config.settings import OptimSettings
from minimind.errors import CheckpointError
from minimind.model import Transformer
from minimind.training import optimizers
from minimind.training.optimizers import _POLYNOMIALS, Muon, Optimizers, orthogonalize

pytestmark = pytest.mark.numeric


def nano(**shape: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**(PRESETS["nano"] | {"vocab_size": 97} | shape)))


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def matrices(*shapes: tuple[int, int]) -> list[nn.Parameter]:
    torch.manual_seed(1)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64), (1, 8), (8, 1)])
def test_orthogonalize_keeps_singular_vectors_and_moves_singular_values_near_one(
    shape: tuple[int, int],
) -> None:
    torch.manual_seed(2)
    left, values, right = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    spread = torch.linspace(0.05, 1.0, values.shape[-1])
    for matrix, nearest in zip(orthogonalize(left * spread @ right), left @ right, strict=True):
        singular_values = torch.linalg.svdvals(matrix)
        assert singular_values.min() > 0.6 and singular_values.max() < 1.3
        assert torch.cosine_similarity(matrix.flatten(), nearest.flatten(), dim=0) > 0.98


@pytest.mark.parametrize(
    "shape", [(48, 48), (96, 40), (40, 56), (40, 96), (1, 8), (24, 400), (150, 160), (300, 130)]
)
def test_orthogonalize_applies_the_polynomial_to_singular_values(shape: tuple[int, int]) -> None:
    """Compare with singular values in float64.

    The Gram matrix holds their squares, so small ones lose precision: a hundredth of what bf16
    would lose.
    """
    generator = torch.Generator().manual_seed(5)
    rank = min(shape)
    gradient = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    # As drawn; over four orders of magnitude; with three large ones, as gradients often have.
    spread = torch.logspace(0, -4, rank, dtype=torch.float64)
    few = torch.full_like(spread, 1e-5)
    few[:3] = 1
    values = torch.stack([values[0], spread, few])
    expected = values / (values**8).sum(-1, keepdim=True) ** (1 / 8)
    for a, b, c in _POLYNOMIALS:
        expected = a * expected + b * expected**3 + c * expected**5
    actual = orthogonalize((left * values[:, None] @ right).float())
    assert actual.dtype == torch.float32
    exact = left * expected[:, None] @ right
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=2e-4)


def test_one_ulp_of_noise_in_a_gradient_is_not_amplified() -> None:
    """In bf16 it would grow to 1e-3, and the number of processes would change the run.

    Here it grows by as much as the smallest singular values do: at most 32 ulp.
    """
    generator = torch.Generator().manual_seed(6)
    for shape in ((64, 64), (64, 176), (176, 64)):
        gradient = torch.randn(2, *shape, generator=generator)
        bits = torch.randint(-1, 2, gradient.shape, generator=generator) * torch.finfo().eps
        exact, noisy = orthogonalize(gradient), orthogonalize(gradient * (1 + bits))
        assert (exact - noisy).norm() < 32 * torch.finfo().eps * exact.norm()


@pytest.mark.parametrize("flush", [False, True], ids=["subnormal", "flushed"])
def test_a_zero_matrix_stays_zero(flush: bool) -> None:
    """Such as that of an expert without tokens, also on devices without subnormal numbers."""
    if flush and not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        assert not orthogonalize(torch.zeros(2, 4, 8)).any()
    finally:
        torch.set_flush_denormal(False)


def test_a_batch_of_matrices_equals_one_matrix_at_a_time() -> None:
    torch.manual_seed(3)
    matrices = torch.randn(5, 24, 40)
    batched = orthogonalize(matrices)
    single = torch.cat([orthogonalize(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(batched, single, rtol=0, atol=1e-5)


def test_each_polynomial_approximates_one_as_well_as_possible() -> None:
    """Chebyshev: the best approximation attains its largest error four times, with changing sign.

    The polynomials were computed for the interval that the previous ones leave, with rounding to
    four decimals and the first with a lower end of 0.02, so the errors are equal within 1 %.
    """
    values = torch.linspace(0.02, 1, 200_001, dtype=torch.float64)
    a, b, c = _POLYNOMIALS[0]
    error = a * values + b * values**3 + c * values**5 - 1
    middle = error[1:-1]
    is_extreme = (middle - error[:-2]) * (error[2:] - middle) < 0
    extremes = torch.cat((error[:1], middle[is_extreme], error[-1:]))
    assert len(extremes) == 4
    assert (extremes[1:] * extremes[:-1] < 0).all()


def test_singular_values_down_to_a_hundredth_become_nearly_one() -> None:
    values = torch.logspace(-2, 0, 1001, dtype=torch.float64)
    for a, b, c in _POLYNOMIALS:
        values = a * values + b * values**3 + c * values**5
    assert values.min() > 0.9
    assert values.max() < 1.1


def _polar(matrices: Tensor) -> Tensor:
    """Return the nearest matrix with singular values of 1, by a singular value decomposition."""
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    return left @ right


def test_muon_matches_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal hyper-parameters give equal steps, with the exact orthogonalization in both."""
    monkeypatch.setattr(optimizers, "orthogonalize", _polar)
    monkeypatch.setattr(
        torch.optim._muon, "_zeropower_via_newtonschulz", lambda matrix, *_: _polar(matrix)
    )
    shapes = ((48, 16), (16, 48), (32, 32), (32, 32), (48, 16))
    ours, theirs = matrices(*shapes), matrices(*shapes)
    before = [p.detach().clone() for p in ours]
    muon = Muon(ours, lr=0.02, momentum=0.9, weight_decay=0.1)
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
            muon.state[one]["momentum"],
            reference.state[other]["momentum_buffer"],
            rtol=1e-5,
            atol=1e-6,
        )
        moved = (other - start).norm()
        assert (one - other).norm() < 1e-4 * moved
        assert moved > 0.05


def test_muon_works_with_torch_schedulers_param_groups_and_state_dicts() -> None:
    """A third run is restored from the state dict of the first and takes the same steps."""
    ours, halved, restored = (matrices((8, 4), (4, 4)) for _ in range(3))

    def build(parameters: list[nn.Parameter]) -> Muon:
        groups = [{"params": parameters[:1], "num_stacked": 2}, {"params": parameters[1:]}]
        return Muon(groups, lr=0.02)

    muon, other = build(ours), build(halved)
    scheduler = torch.optim.lr_scheduler.LambdaLR(other, lambda step: 0.5**step)
    start = [p.detach().clone() for p in ours]
    for parameters, optimizer in ((ours, muon), (halved, other)):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, halved, strict=True))
    scheduler.step()
    assert [group["lr"] for group in other.param_groups] == [0.01, 0.01]
    assert not any(torch.equal(a, b) for a, b in zip(ours, start, strict=True))

    third = build(restored)
    third.load_state_dict(copy.deepcopy(muon.state_dict()))
    assert [group["num_stacked"] for group in third.param_groups] == [2, 1]
    with torch.no_grad():
        for parameter, value in zip(restored, ours, strict=True):
            parameter.copy_(value)
    for parameters, optimizer in ((ours, muon), (restored, third)):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, restored, strict=True))


def test_muon_skips_parameters_without_a_gradient() -> None:
    [parameter] = matrices((4, 4))
    before = parameter.detach().clone()
    Muon([parameter], weight_decay=0.5).step()
    assert torch.equal(parameter, before)


def test_adamw_matches_torch_and_decays_only_matrices() -> None:
    settings = OptimSettings(name="adamw", lr=0.01, weight_decay=0.5, beta1=0.8, eps=1e-6)
    model = nano(qk_norm=True)
    reference = copy.deepcopy(model)
    decays = [p for p in reference.parameters() if p.ndim == 2]
    plain = [p for p in reference.parameters() if p.ndim == 1]
    assert len(plain) == 1 + 2 * 4  # the final norm, and per layer two norms and those of q and k
    groups = [{"params": decays, "weight_decay": 0.5}, {"params": plain, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, settings.beta2), eps=1e-6)
    ours = Optimizers(model, settings)
    for step in range(3):
        set_gradients(model, step)
        set_gradients(reference, step)
        ours.step()
        theirs.step()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_norms_are_not_decayed() -> None:
    model = nano()
    optimizers = Optimizers(model, OptimSettings(weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step()
    for name, parameter in model.named_parameters():
        shrunk = (parameter.abs() < before[name].abs()).any()
        assert bool(shrunk) == (parameter.ndim == 2), name


def test_muon_trains_the_hidden_matrices_and_adamw_the_rest() -> None:
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


def test_muon_orthogonalizes_each_expert_and_gate_and_up_separately() -> None:
    """The result equals that of separate parameters, as a dense model has."""
    shapes = {"experts": (3, 32, 12), "down": (3, 12, 16), "shared": (32, 12)}
    torch.manual_seed(4)
    ours = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    stacked = {"params": [ours["experts"], ours["shared"]], "num_stacked": 2}
    muon = Muon([stacked, {"params": [ours["down"]]}], lr=0.02, weight_decay=0.1)

    def parts(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        halves = [half for expert in tensors["experts"] for half in expert.chunk(2)]
        return [*halves, *tensors["down"], *tensors["shared"].chunk(2)]

    single = [nn.Parameter(part.detach().clone()) for part in parts(ours)]
    separate = Muon(single, lr=0.02, weight_decay=0.1)
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
        separate.step()
    assert len(single) == 11
    for expected, actual in zip(single, parts(ours), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_stacked_projections_of_experts_are_recognised_by_name() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**(PRESETS["nano-moe"] | {"vocab_size": 97})))
    optimizers = Optimizers(model, OptimSettings())
    names = {parameter: name for name, parameter in model.named_parameters()}
    router = "model.layers.0.block_sparse_moe.router.layer.weight"
    assert f"exp_avg/{router}" in optimizers.state_tensors()  # AdamW's
    rows = {
        names[p].removeprefix("model.layers.0."): p.shape[-2] // group["num_stacked"]
        for group in optimizers.all["muon"].param_groups
        for p in group["params"]
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


def test_frozen_parameters_stay_and_have_no_state() -> None:
    model = nano()
    model.model.embed_tokens.requires_grad_(False)
    optimizers = Optimizers(model, OptimSettings())
    assert not any("embed_tokens" in name for name in optimizers.state_tensors())
    before = model.model.embed_tokens.weight.clone()
    set_gradients(model, 0)
    optimizers.step()
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_learning_rates_are_fractions_of_their_peaks() -> None:
    optimizers = Optimizers(nano(), OptimSettings(lr=0.5, muon_lr=0.25))
    assert optimizers.lrs() == {"adamw": 0.5, "muon": 0.25}
    optimizers.set_lr(0.5)
    assert optimizers.lrs() == {"adamw": 0.25, "muon": 0.125}
    model = nano()
    before = [p.detach().clone() for p in model.parameters()]
    optimizers = Optimizers(model, OptimSettings())
    optimizers.set_lr(0.0)
    set_gradients(model, 0)
    optimizers.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_continues_from_a_loaded_state_bit_for_bit(name: str) -> None:
    """Three steps, a save, a load and one step equal four steps."""
    settings = OptimSettings(name=name)  # type: ignore[arg-type]
    model = nano()
    optimizers = Optimizers(model, settings)
    assert all(not tensor.any() for tensor in optimizers.state_tensors().values())
    for step in range(3):
        set_gradients(model, step)
        optimizers.step()
    other = copy.deepcopy(model)
    others = Optimizers(other, settings)
    saved = {key: tensor.clone() for key, tensor in optimizers.state_tensors().items()}
    others.load_state_tensors(saved)
    for one, its in ((model, optimizers), (other, others)):
        set_gradients(one, 3)
        its.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    state = optimizers.state_tensors()
    assert all(torch.equal(state[key], tensor) for key, tensor in others.state_tensors().items())


def test_state_of_another_model_or_optimizer_is_refused() -> None:
    optimizers = Optimizers(nano(), OptimSettings())
    good = optimizers.state_tensors()
    key = next(iter(good))
    mismatched = [
        {},
        {k: v for k, v in good.items() if k != key},
        good | {"more": torch.zeros(1)},
        good | {key: torch.zeros(3, 5)},
        Optimizers(nano(), OptimSettings(name="adamw")).state_tensors(),
        Optimizers(nano(num_hidden_layers=3), OptimSettings()).state_tensors(),
    ]
    for state in mismatched:
        with pytest.raises(CheckpointError, match="belongs to another model or optimizer"):
            optimizers.load_state_tensors(state)


def test_zero_grad_frees_all_gradients() -> None:
    model = nano()
    optimizers = Optimizers(model, OptimSettings())
    set_gradients(model, 0)
    optimizers.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
