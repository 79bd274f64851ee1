"""Statistics of repeated measurements."""

import statistics
from collections.abc import Mapping, Sequence

Metrics = Mapping[str, float]


def over_rounds(rounds: Mapping[str, Sequence[Metrics]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return median, minimum and maximum over the rounds of each metric of each contender."""
    return {
        name: {
            key: {
                "median": statistics.median(metrics[key] for metrics in measured),
                "min": min(metrics[key] for metrics in measured),
                "max": max(metrics[key] for metrics in measured),
            }
            for key in measured[0]
        }
        for name, measured in rounds.items()
    }


def spread(metric: Mapping[str, float]) -> str:
    """Format minimum and maximum as "2,700-2,835"."""
    return f"{metric['min']:,.0f}-{metric['max']:,.0f}"
