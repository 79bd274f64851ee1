"""Formatting of metrics that can be missing or damaged."""

from collections.abc import Mapping
from typing import Any

MISSING = "–"


def number_of(metrics: Mapping[str, Any], key: str) -> float | None:
    """Return a metric, None if it is missing or not a number."""
    value = metrics.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def format_metric(metrics: Mapping[str, Any], key: str, spec: str) -> str:
    """Format a metric by a format spec."""
    value = number_of(metrics, key)
    return MISSING if value is None else format(value, spec)


def format_percent(value: float | None) -> str:
    """Format 0.1234 as 12.3%."""
    return MISSING if value is None else f"{value:.1%}"
