from dataclasses import replace

import pytest
import torch

from minimind.errors import ResourceError
from minimind.model import PRESETS, ModelConfig, Transformer
from minimind.training.memory import Footprint, choose_micro_batch
from minimind.training.optimizers import count_moments

CPU = torch.device("cpu")
GB = 1 << 30


def footprint(
    preset: str = "small", seq_len: int = 512, *, activation_checkpointing: bool = False
) -> Footprint:
    with torch.device("meta"):
        model = Transformer(ModelConfig(**PRESETS[preset]))
    number = sum(parameter.numel() for parameter in model.parameters())
    return Footprint(
        model.config, number, number, 2 * number, seq_len, "cuda", activation_checkpointing
    )


def test_the_total_is_the_sum_of_the_components() -> None:
    small = footprint()
    components = small.components(4)
    assert components["weights"] == components["gradients"] == 4 * 26_878_464
    assert components["optimizer"] == 8 * 26_878_464
    assert small.total(4) == sum(components.values())
    assert small.components(8)["activations"] == 2 * components["activations"]


def test_frozen_weights_have_no_gradients() -> None:
    adapters = replace(footprint(), trained_parameters=1000, moments=2000)
    assert adapters.components(1)["gradients"] == 4000
    assert adapters.components(1)["optimizer"] == 8000


def test_zero_divides_the_state_among_the_processes() -> None:
    whole = footprint().components(1)
    factors = {1: (1, 1, 1 / 4), 2: (1, 1 / 4, 1 / 4), 3: (5 / 4, 1 / 4, 1 / 4)}
    for stage, expected in factors.items():
        sharded = replace(footprint(), zero_stage=stage, num_processes=4).components(1)
        names = ("weights", "gradients", "optimizer")
        assert tuple(sharded[name] / whole[name] for name in names) == expected
        assert sharded["activations"] == whole["activations"]


def test_saving_needs_a_copy_only_in_host_memory() -> None:
    gpu = footprint().components(4)
    cpu = replace(footprint(), device_type="cpu").components(4)
    assert gpu["checkpoint copy"] == 0
    assert cpu["checkpoint copy"] == 12 * 26_878_464  # weights and both moments


def test_activation_checkpointing_saves_most_activation_memory() -> None:
    stored = footprint("base")
    recomputed = footprint("base", activation_checkpointing=True)
    assert recomputed.components(4)["activations"] < stored.components(4)["activations"] / 4
    assert recomputed.total(1) < 2 * GB


def test_the_largest_fitting_divisor_is_chosen() -> None:
    small = footprint()
    memory = small.total(8)
    assert small.largest_micro_batch(48, memory) == 8
    assert small.largest_micro_batch(48, memory - 1) == 6
    assert small.largest_micro_batch(48, small.total(1) - 1) is None
    assert small.largest_micro_batch(48, None) == 48
    assert small.largest_micro_batch(256, None) == 64  # a GPU is no faster beyond that


@pytest.mark.parametrize(
    ("requested", "recompute", "advice"),
    [
        (16, False, r"training\.micro_batch_size=8 would fit"),
        (None, False, r"try training\.activation_checkpointing=true"),
        (None, True, "try a smaller model"),
    ],
)
def test_too_little_memory_is_an_error_that_says_what_would_fit(
    requested: int | None, recompute: bool, advice: str
) -> None:
    small = footprint(activation_checkpointing=recompute)
    free = small.total(8) if requested else small.total(1) - 1
    with pytest.raises(ResourceError, match=advice):
        choose_micro_batch(small, requested=requested, num_sequences=32, device=CPU, free=free)


@pytest.mark.parametrize(
    ("saved", "requested", "fits", "chosen"),
    [(8, None, 16, 8), (8, 4, 16, 4), (8, 16, 32, 8), (8, None, 2, 2), (8, 8, 2, 2), (1, 8, 4, 1)],
)
def test_on_resume_the_smallest_of_saved_requested_and_fitting_is_chosen(
    saved: int, requested: int | None, fits: int, chosen: int
) -> None:
    small = footprint()
    arguments = {"requested": requested, "num_sequences": 32, "device": CPU, "saved": saved}
    assert choose_micro_batch(small, free=small.total(fits), **arguments) == chosen
    assert choose_micro_batch(small, free=None, **arguments) == min(saved, requested or saved)


@pytest.mark.parametrize("recompute", [False, True])
def test_advice_on_resume_names_only_settings_that_may_change(recompute: bool) -> None:
    small = footprint(activation_checkpointing=recompute)
    with pytest.raises(ResourceError) as caught:
        free = small.total(1) - 1
        choose_micro_batch(small, requested=None, num_sequences=8, device=CPU, saved=4, free=free)
    assert "model.preset" not in str(caught.value) and "data.seq_len" not in str(caught.value)
    assert ("training.activation_checkpointing=true" in str(caught.value)) != recompute


def test_count_moments_matches_the_state_of_the_optimizers() -> None:
    from minimind.config.settings import OptimSettings
    from minimind.training.optimizers import Optimizers

    model = Transformer(ModelConfig(**PRESETS["nano-moe"]))
    for name in ("adamw", "muon"):
        settings = OptimSettings(name=name)
        state = Optimizers(model, settings).state_tensors()
        kept = sum(t.numel() for key, t in state.items() if not key.startswith("step/"))
        assert count_moments(model, settings) == kept
