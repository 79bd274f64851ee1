"""Statistics of repeated measurements."""

import statistics
from collections.abc import Mapping, Sequence

Metrics = Mapping[str, float]


def over_rounds(rounds: Mapping[str, Sequence[Metrics]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return median, minimum and maximum over the rounds of each metric of each contender."""
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


def spread(metric: Mapping[str, float]) -> str:
    """Format minimum and maximum as "2,700-2,835"."""
    return f"{metric['min']:,.0f}-{metric['max']:,.0f}"
