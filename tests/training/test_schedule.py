from itertools import pairwise

import pytest

from minimind.config.settings import ScheduleSettings
from minimind.training.schedule import lr_fraction


def curve(num_steps: int, **settings: object) -> list[float]:
    schedule = ScheduleSettings(**settings)  # type: ignore[arg-type]
    return [lr_fraction(step, num_steps, schedule) for step in range(num_steps)]


@pytest.mark.parametrize("name", ["cosine", "wsd"])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("num_steps", [2, 10, 1000])
def test_it_rises_once_and_falls_to_the_final_share(
    name: str, final: float, num_steps: int
) -> None:
    shares = curve(num_steps, name=name, warmup=0.1, decay=0.3, final=final)
    peak = shares.index(1.0)
    assert all(a < b for a, b in pairwise(shares[: peak + 1]))
    assert all(a >= b for a, b in pairwise(shares[peak:]))
    assert shares[-1] == pytest.approx(final, abs=1e-12)
    assert all(0 <= share <= 1 for share in shares)


def test_warmup_is_linear_and_never_nothing() -> None:
    assert curve(100, warmup=0.04)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert curve(100, warmup=0.0)[0] == 1.0


def test_cosine_is_half_way_at_half_time() -> None:
    shares = curve(101, name="cosine", warmup=0.0, final=0.2)
    assert shares[50] == pytest.approx(0.6)
    assert shares[25] + shares[75] == pytest.approx(1.2)


def test_wsd_is_stable_and_then_falls_in_a_line() -> None:
    shares = curve(100, name="wsd", warmup=0.1, decay=0.2, final=0.0)
    assert shares[9:80] == [1.0] * 71
    assert shares[79:] == pytest.approx([1 - at / 20 for at in range(21)])


@pytest.mark.parametrize("name", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_shortest_run_has_a_learning_rate(name: str, warmup: float, decay: float) -> None:
    [share] = curve(1, name=name, warmup=warmup, decay=decay, final=0.1)
    assert 0 < share <= 1
