from itertools import pairwise

import pytest
from pydantic import ValidationError

from minimind.config import load_recipe
from minimind.config.load import packaged_recipes
from minimind.config.settings import ScheduleSettings
from minimind.training.schedule import lr_fraction

SCHEDULES = {"cosine": {}, "wsd": {"decay": 0.3}}


def curve(num_steps: int, **settings: object) -> list[float]:
    schedule = ScheduleSettings(**settings)  # type: ignore[arg-type]
    return [lr_fraction(step, num_steps, schedule) for step in range(num_steps)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("num_steps", [2, 10, 1000])
def test_lr_rises_to_its_peak_and_falls_to_the_final_fraction(
    name: str, final: float, num_steps: int
) -> None:
    settings = ScheduleSettings(name=name, warmup=0.1, final=final, **SCHEDULES[name])  # type: ignore[arg-type]
    fractions = [lr_fraction(step, num_steps, settings) for step in range(num_steps)]
    peak = fractions.index(1.0)
    assert all(a < b for a, b in pairwise(fractions[: peak + 1]))
    assert all(a >= b for a, b in pairwise(fractions[peak:]))
    assert all(0 < fraction <= 1 for fraction in fractions)
    assert fractions[-1] > final or final == 1
    assert lr_fraction(num_steps, num_steps, settings) == pytest.approx(final, abs=1e-12)


def test_warmup_is_linear_and_never_zero() -> None:
    assert curve(100, warmup=0.04)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert curve(100, warmup=0.0)[0] == 1.0


def test_cosine_is_halfway_down_at_half_of_the_run() -> None:
    fractions = curve(100, name="cosine", warmup=0.0, final=0.2)
    assert fractions[50] == pytest.approx(0.6)
    assert fractions[25] + fractions[75] == pytest.approx(1.2)


def test_wsd_is_stable_and_then_decays_linearly() -> None:
    fractions = curve(100, name="wsd", warmup=0.1, decay=0.2, final=0.0)
    assert fractions[9:81] == [1.0] * 72
    assert fractions[80:] == pytest.approx([1 - step / 20 for step in range(20)])


@pytest.mark.parametrize(("warmup", "decay"), [(0.5, 0.5), (0.25, 0.75), (0.7, 0.3), (1.0, 0.0)])
@pytest.mark.parametrize("num_steps", range(1, 12))
def test_wsd_reaches_its_peak_when_warmup_and_decay_are_rounded_up(
    warmup: float, decay: float, num_steps: int
) -> None:
    assert max(curve(num_steps, name="wsd", warmup=warmup, decay=decay, final=0.0)) == 1.0


@pytest.mark.parametrize("name", packaged_recipes())
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 50, 1000])
def test_lr_of_packaged_recipes_is_never_zero(name: str, num_steps: int) -> None:
    schedule = load_recipe(name).recipe.schedule
    fractions = [lr_fraction(step, num_steps, schedule) for step in range(num_steps)]
    assert min(fractions) > 0 and max(fractions) == 1.0


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize(
    "settings",
    [
        {"name": "cosine", "warmup": 0.0},
        {"name": "cosine", "warmup": 1.0},
        {"name": "wsd", "warmup": 0.0, "decay": 0.0},
        {"name": "wsd", "warmup": 0.0, "decay": 1.0},
        {"name": "wsd", "warmup": 0.5, "decay": 0.5},
        {"name": "wsd", "warmup": 1.0, "decay": 0.0},
    ],
)
def test_single_step_has_the_peak_lr(settings: dict[str, object], final: float) -> None:
    assert curve(1, final=final, **settings) == [1.0]


def test_contradictory_settings_are_errors() -> None:
    with pytest.raises(ValidationError, match=r"warmup \(0.7\) and decay \(0.6\) .* more than 1"):
        ScheduleSettings(name="wsd", warmup=0.7, decay=0.6)
    with pytest.raises(ValidationError, match=r"decay \(0.2\) applies to wsd only"):
        ScheduleSettings(name="cosine", decay=0.2)
    assert ScheduleSettings(name="wsd", warmup=0.3, decay=0.7).decay == 0.7
    assert ScheduleSettings(name="wsd").decay == 0.2
    assert ScheduleSettings(name="cosine", warmup=0.9).decay is None
