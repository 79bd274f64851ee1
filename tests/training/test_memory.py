from dataclasses import replace

import pytest
import torch

from minimind.errors import ResourceError
from minimind.model import PRESETS, ModelConfig, Transformer
from minimind.training.memory import Footprint, choose_micro_batch
from minimind.training.optimizers import count_moments

CPU = torch.device("cpu")
GB = 1 << 30


def footprint(preset: str = "small", seq_len: int = 512, *, again: bool = False) -> Footprint:
    with torch.device("meta"):
        model = Transformer(ModelConfig(**PRESETS[preset]))
    number = sum(parameter.numel() for parameter in model.parameters())
    return Footprint(model.config, number, number, 2 * number, seq_len, "cuda", again)


def test_a_step_is_the_sum_of_its_parts() -> None:
    small = footprint()
    parts = small.parts(4)
    assert parts["weights"] == parts["gradients"] == 4 * 26_878_464
    assert parts["optimizer"] == 8 * 26_878_464
    assert small.total(4) == sum(parts.values())
    assert small.parts(8)["activations"] == 2 * parts["activations"]


def test_frozen_weights_have_no_gradients() -> None:
    adapters = replace(footprint(), trained_parameters=1000, moments=2000)
    assert adapters.parts(1)["gradients"] == 4000
    assert adapters.parts(1)["optimizer"] == 8000


def test_a_save_takes_a_copy_where_there_is_no_memory_but_the_machines() -> None:
    card = footprint().parts(4)
    machine = replace(footprint(), device_type="cpu").parts(4)
    assert card["copy that is saved"] == 0
    assert machine["copy that is saved"] == 12 * 26_878_464  # weights and both moments


def test_computing_activations_again_saves_most_of_them() -> None:
    kept, again = footprint("base"), footprint("base", again=True)
    assert again.parts(4)["activations"] < kept.parts(4)["activations"] / 4
    assert again.total(1) < 2 * GB


def test_the_largest_divisor_that_fits_is_taken() -> None:
    small = footprint()
    room = small.total(8)
    assert small.fitting(48, room) == 8
    assert small.fitting(48, room - 1) == 6
    assert small.fitting(48, small.total(1) - 1) is None
    assert small.fitting(48, None) == 48
    assert small.fitting(256, None) == 64  # beyond, a GPU is no faster


@pytest.mark.parametrize(
    ("asked", "again", "advice"),
    [
        (16, False, r"training\.micro_batch_size=8 would fit"),
        (None, False, r"try training\.activation_checkpointing=true"),
        (None, True, "take a smaller model"),
    ],
)
def test_too_little_memory_is_told_with_what_would_do(
    asked: int | None, again: bool, advice: str
) -> None:
    small = footprint(again=again)
    free = small.total(8) if asked else small.total(1) - 1
    with pytest.raises(ResourceError, match=advice):
        choose_micro_batch(small, asked=asked, batch=32, device=CPU, free=free)


@pytest.mark.parametrize(
    ("saved", "asked", "fits", "chosen"),
    [(8, None, 16, 8), (8, 4, 16, 4), (8, 16, 32, 8), (8, None, 2, 2), (8, 8, 2, 2), (1, 8, 4, 1)],
)
def test_on_resume_the_smallest_of_saved_asked_and_fitting_is_taken(
    saved: int, asked: int | None, fits: int, chosen: int
) -> None:
    small = footprint()
    given = {"asked": asked, "batch": 32, "device": CPU, "saved": saved}
    assert choose_micro_batch(small, free=small.total(fits), **given) == chosen
    assert choose_micro_batch(small, free=None, **given) == min(saved, asked or saved)


@pytest.mark.parametrize("again", [False, True])
def test_too_little_memory_on_resume_advises_only_what_a_begun_run_may_change(again: bool) -> None:
    small = footprint(again=again)
    with pytest.raises(ResourceError) as caught:
        free = small.total(1) - 1
        choose_micro_batch(small, asked=None, batch=8, device=CPU, saved=4, free=free)
    assert "model.preset" not in str(caught.value) and "data.seq_len" not in str(caught.value)
    assert ("training.activation_checkpointing=true" in str(caught.value)) != again


def test_moments_are_what_the_optimizers_keep() -> None:
    from minimind.config.settings import OptimSettings
    from minimind.training.optimizers import Optimizers

    model = Transformer(ModelConfig(**PRESETS["nano-moe"]))
    for name in ("adamw", "muon"):
        settings = OptimSettings(name=name)
        state = Optimizers(model, settings).state_tensors()
        kept = sum(t.numel() for key, t in state.items() if not key.startswith("step/"))
        assert count_moments(model, settings) == kept
