"""Statistics of repeated measurements: the same for every contender."""

import statistics
from collections.abc import Mapping, Sequence

Metrics = Mapping[str, float]


def over_rounds(rounds: Mapping[str, Sequence[Metrics]]) -> dict[str, dict[str, dict[str, float]]]:
    """Median, minimum and maximum over the rounds, of each figure of each contender."""
    return {
        name: {
            key: {
                "median": statistics.median(one[key] for one in measured),
                "min": min(one[key] for one in measured),
                "max": max(one[key] for one in measured),
            }
            for key in measured[0]
        }
        for name, measured in rounds.items()
    }


def spread(figure: Mapping[str, float]) -> str:
    """Minimum and maximum, as in "2,700-2,835"."""
    return f"{figure['min']:,.0f}-{figure['max']:,.0f}"
