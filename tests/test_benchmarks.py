"""Statistics of the benchmark scripts."""

from benchmarks.rounds import over_rounds, spread


def test_statistics_over_rounds() -> None:
    rounds = {
        "ours": [{"rate": 2700.0}, {"rate": 2835.0}, {"rate": 2710.0}],
        "theirs": [{"rate": 1500.0}, {"rate": 1600.0}],
    }
    metrics = over_rounds(rounds)
    assert metrics == {
        "ours": {"rate": {"median": 2710.0, "min": 2700.0, "max": 2835.0}},
        "theirs": {"rate": {"median": 1550.0, "min": 1500.0, "max": 1600.0}},
    }
    assert spread(metrics["ours"]["rate"]) == "2,700-2,835"
