"""Plots of reports, drawn once for equal curves: a plot takes longer than a step of training."""

from typing import Any

import pytest

from minimind.reporting import curves, scaling
from minimind.reporting.plots import draw

_drawings: dict[str, str] = {}


def draw_equal_plots_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the plots that a test of this process has drawn before from memory."""
    for module in (curves, scaling):
        monkeypatch.setattr(module, "draw", _draw_once)


def _draw_once(*arguments: Any, **options: Any) -> str:
    key = repr((arguments, options))
    if key not in _drawings:
        _drawings[key] = draw(*arguments, **options)
    return _drawings[key]
