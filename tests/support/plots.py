"""Plots of reports, drawn once or not at all: a plot takes longer than a step of training."""

import hashlib
from typing import Any

import pytest

from minimind.reporting import curves, scaling
from minimind.reporting.plots import draw

_drawings: dict[str, str] = {}


def draw_equal_plots_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the plots that a test of this process has drawn before from memory."""
    for module in (curves, scaling):
        monkeypatch.setattr(module, "draw", _draw_once)


def draw_placeholders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace plots by empty drawings, which are equal if the curves and labels are."""
    for module in (curves, scaling):
        monkeypatch.setattr(module, "draw", _draw_placeholder)


def _draw_placeholder(*arguments: Any, **options: Any) -> str:
    key = repr((arguments, options)).encode()
    return f'<svg id="{hashlib.sha256(key).hexdigest()}"></svg>'


def _draw_once(*arguments: Any, **options: Any) -> str:
    key = repr((arguments, options))
    if key not in _drawings:
        _drawings[key] = draw(*arguments, **options)
    return _drawings[key]
