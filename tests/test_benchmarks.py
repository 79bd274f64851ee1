"""What the benchmarks compute from what they measure."""

from benchmarks.rounds import over_rounds, spread


def test_one_statistic_serves_every_contender() -> None:
    rounds = {
        "ours": [{"rate": 2700.0}, {"rate": 2835.0}, {"rate": 2710.0}],
        "theirs": [{"rate": 1500.0}, {"rate": 1600.0}],
    }
    figures = over_rounds(rounds)
    assert figures == {
        "ours": {"rate": {"median": 2710.0, "min": 2700.0, "max": 2835.0}},
        "theirs": {"rate": {"median": 1550.0, "min": 1500.0, "max": 1600.0}},
    }
    assert spread(figures["ours"]["rate"]) == "2,700-2,835"
