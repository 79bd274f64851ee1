import pytest
import torch

from minimind.errors import ResourceError
from minimind.training.precision import LossScaler, choose_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_scale_is_halved_by_an_overflow_and_doubled_after_many_finite_steps() -> None:
    scaler = LossScaler(scale=8.0, enabled=True)
    for _ in range(1999):
        scaler.update(True)
    assert scaler.scale == 8.0
    scaler.update(True)
    assert scaler.scale == 16.0
    scaler.update(False)
    assert (scaler.scale, scaler.good_steps) == (8.0, 0)
    for _ in range(2000):
        scaler.update(True)
    assert scaler.scale == 16.0


def test_scale_stays_at_least_one() -> None:
    scaler = LossScaler(scale=2.0, enabled=True)
    for _ in range(5):
        scaler.update(False)
    assert scaler.scale == 1.0


def test_disabled_scaler_does_nothing() -> None:
    scaler = LossScaler()
    for finite in (False, *[True] * 2000):
        scaler.update(finite)
    assert scaler == LossScaler()


def test_scaler_state_is_restored() -> None:
    scaler, other = LossScaler(scale=8.0, enabled=True), LossScaler(scale=2.0, enabled=True)
    for _ in range(1500):
        scaler.update(True)
    other.load_state_dict(scaler.state_dict())
    for _ in range(500):
        scaler.update(True)
        other.update(True)
    assert other == scaler
    assert other.scale == 16.0


@pytest.mark.numeric
def test_auto_on_a_cpu_is_bf16_if_the_hardware_supports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [(True, True, "bf16"), (False, True, "fp32"), (True, False, "fp32")]
    for has, onednn_may, name in kinds:
        monkeypatch.setattr(
            torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda may=onednn_may: may
        )
        for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, check, lambda has=has: has)
        assert choose_precision("auto", CPU).name == name
        assert choose_precision("bf16", CPU).name == "bf16"


def test_auto_on_a_gpu_without_bf16_is_fp16_with_loss_scaling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    precision = choose_precision("auto", CUDA)
    assert (precision.name, precision.scaler) == ("fp16", LossScaler(2.0**16, enabled=True))
    with pytest.raises(
        ResourceError, match=r"cuda does not support bf16; use training\.precision=fp16"
    ):
        choose_precision("bf16", CUDA)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    precision = choose_precision("auto", CUDA)
    assert (precision.name, precision.scaler) == ("bf16", LossScaler())


def test_fp16_on_a_cpu_is_an_error() -> None:
    with pytest.raises(ResourceError, match="fp16 needs a CUDA device, and this is cpu"):
        choose_precision("fp16", CPU)


@pytest.mark.numeric
@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_applies_to_matrix_products(name: str, dtype: torch.dtype) -> None:
    weights = torch.ones(4, 4)
    with choose_precision(name, CPU).autocast():
        assert (weights @ weights).dtype == dtype
        assert (weights + weights).dtype == torch.float32
