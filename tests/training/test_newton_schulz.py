"""The compiled Newton-Schulz iteration, compared with float64 and with PyTorch's operations."""

import pytest
import torch
from torch import Tensor

from minimind.environment import NATIVE_VARIABLE
from minimind.training import newton_schulz
from minimind.training.optimizers import _POLYNOMIALS, orthogonalize
from tests.support.decoding import enable_native


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use compiled code; skip the tests on processors without AMX."""
    enable_native(monkeypatch)
    if not newton_schulz.takes(torch.empty(1)):
        pytest.skip("this processor has no AMX")


def spectra(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, three rows of singular values, and Vᵀ in float64.

    The values are those of a random matrix; spread over four orders of magnitude; a few large ones.
    """
    generator = torch.Generator().manual_seed(5)
    gradient = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    values[1] = torch.logspace(0, -4, min(shape), dtype=torch.float64)
    values[2, 3:] = 1e-5 * values[2, 0]
    return left, values, right


@pytest.mark.parametrize(
    "shape",
    [(32, 32), (64, 16), (1, 8), (40, 56), (300, 130), (130, 300), (320, 320), (96, 700)],
)
def test_applies_the_polynomials_to_singular_values(shape: tuple[int, int]) -> None:
    left, values, right = spectra(shape)
    expected = values / (values**8).sum(-1, keepdim=True) ** (1 / 8)
    for a, b, c in _POLYNOMIALS:
        expected = a * expected + b * expected**3 + c * expected**5
    actual = orthogonalize((left * values[:, None] @ right).float())
    assert actual.dtype == torch.float32
    exact = left * expected[:, None] @ right
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=2e-4)


def test_the_bits_depend_neither_on_threads_nor_on_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrices = torch.randn(5, 70, 200, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(orthogonalize(matrices))
    finally:
        torch.set_num_threads(threads)
    single = torch.cat([orthogonalize(matrix[None]) for matrix in matrices])
    assert all(torch.equal(result, single) for result in results)
    monkeypatch.setenv(NATIVE_VARIABLE, "0")
    assert not torch.equal(orthogonalize(matrices), single)  # otherwise torch computed all of them


def test_noise_in_a_gradient_is_amplified_little() -> None:
    """One ulp: with two bf16 parts instead of three it would grow to 1e-4."""
    generator = torch.Generator().manual_seed(6)
    for shape in ((64, 64), (64, 176), (176, 64), (512, 512)):
        gradient = torch.randn(2, *shape, generator=generator)
        bits = torch.randint(-1, 2, gradient.shape, generator=generator) * torch.finfo().eps
        exact, noisy = orthogonalize(gradient), orthogonalize(gradient * (1 + bits))
        assert (exact - noisy).norm() < 64 * torch.finfo().eps * exact.norm()


def test_a_zero_matrix_stays_zero() -> None:
    assert not orthogonalize(torch.zeros(2, 40, 33)).any()


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_the_scale_of_a_gradient_has_no_effect(scale: float) -> None:
    gradient = torch.randn(1, 48, 80, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(
        orthogonalize(gradient * scale), orthogonalize(gradient), rtol=0, atol=1e-5
    )


def test_not_a_number_reaches_the_result() -> None:
    matrices = torch.randn(2, 40, 40, generator=torch.Generator().manual_seed(8))
    matrices[0, 3, 3] = float("nan")
    result = orthogonalize(matrices)
    assert result[0].isnan().any()
    assert result[1].isfinite().all()
