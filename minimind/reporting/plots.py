"""Plots as SVG that takes the colour of the surrounding text and needs no font."""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK = "#010203"  # replaced by currentColor, the text colour of the page
_COLORS = ["#3b8ad8", "#e8772e", "#2a9d5c", "#b065c9", "#c9a227", "#d9583b", "#3aa6a6", "#8c6d5a"]
_STYLE: dict[Any, Any] = {
    **{f"{part}.color": _INK for part in ("text", "xtick", "ytick", "grid")},
    **{f"axes.{part}": _INK for part in ("edgecolor", "labelcolor")},
    **{f"axes.spines.{side}": False for side in ("top", "right")},
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.prop_cycle": f"cycler('color', {_COLORS})",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "svg.fonttype": "path",  # glyphs as shapes, so that no font is needed
}
_MANY_POINTS = 100  # from here on, training is smoothed and validation has no dots
_MAX_POINTS = 400
_FEW_NAMES, _LONG_NAME = 4, 28  # a legend with more or longer names goes below the axes
Kind = Literal["train", "measured", "points", "fit"]


@dataclass(frozen=True)
class Line:
    """A curve of (x, y) points.

    kind: `train` is smoothed, `measured` has a dot per point, `points` has only dots, `fit` is
    dashed.
    """

    name: str
    points: Sequence[tuple[float, float]]
    kind: Kind = "measured"


def draw(
    lines: Sequence[Line],
    x: str,
    y: str,
    *,
    salt: str,
    from_zero: bool = False,
    logarithmic: bool = False,
    level: tuple[str, float] | None = None,
) -> str:
    """Draw lines as an <svg> element without a namespace.

    x and y: axis labels. level: name and value of a dashed horizontal line. salt: as for
    `new_figure`.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator

    names, longest = len(lines), max(len(line.name) for line in lines)
    below = names > _FEW_NAMES or longest > _LONG_NAME
    columns = 2 if longest <= _LONG_NAME else 1
    size = (5.5, 3.2 + 0.19 * -(-names // columns)) if below else (4.4, 3)
    with new_figure(size, salt=salt) as figure:
        axes = figure.subplots()
        for number, line in enumerate(lines):
            _draw_line(axes, line, f"C{number}", "--" if number >= len(_COLORS) else "-")
        if level:
            name, value = level
            axes.axhline(value, ls="--", lw=1.2, color=_INK, alpha=0.6, label=name)
        axes.set(xlabel=x, ylabel=y)
        axes.grid(alpha=0.15)
        if logarithmic:
            _set_logarithmic(axes)
        else:
            if from_zero:
                axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            if max(value for line in lines for _, value in line.points) >= 1000:
                axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        if below:
            figure.legend(loc="outside lower left", ncols=columns, frameon=False, fontsize=8)
        elif len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(frameon=False, fontsize=9)
        return to_svg(figure)


@contextmanager
def new_figure(size: tuple[float, float], *, salt: str) -> "Iterator[Figure]":
    """Yield a figure of `size` inches in the style of all plots, which ends with the block.

    The output is deterministic; `salt` makes ids unique in a page.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": salt}):
        yield Figure(figsize=size, layout="constrained")


def to_svg(figure: "Figure") -> str:
    """Draw a figure of `new_figure`, inside its block, as an <svg> element without a namespace."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():  # about characters that the font lacks
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    drawing = buffer.getvalue()
    drawing = re.sub(r' xmlns(:xlink)?="[^"]*"', "", drawing[drawing.index("<svg") :])
    return drawing.replace(_INK, "currentColor")


def as_file(drawing: str) -> str:
    """Return a drawing as an SVG file, in a grey that is visible on white and on black."""
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return drawing.replace("<svg", f"<svg {names}", 1).replace("currentColor", "#808080")


def _escape_label(name: str) -> str:
    """Escape a name: matplotlib reads $ as a formula, and hides names that start with _."""
    return re.sub("^_", " _", name.replace("$", r"\$"))


def _draw_line(axes: Any, line: Line, color: str, style: str) -> None:
    points, label = thinned(line.points), _escape_label(line.name)
    xs, values = [x for x, _ in points], [value for _, value in points]
    if line.kind == "fit":
        axes.plot(xs, values, ls="--", lw=1.2, color=_INK, alpha=0.7, label=label)
    elif line.kind == "points":
        axes.plot(xs, values, ls="", marker="o", ms=4.5, color=color, label=label)
    else:
        many = len(points) >= _MANY_POINTS
        dots = "o" if len(points) == 1 or (line.kind == "measured" and not many) else ""
        if many and line.kind == "train":
            axes.plot(xs, values, lw=0.8, alpha=0.35, color=color)
            values = smoothed(values)
        axes.plot(xs, values, marker=dots, ms=3.5, lw=1.6, ls=style, color=color, label=label)


def _set_logarithmic(axes: Any) -> None:
    """Make both axes logarithmic, with enough tick labels even within one decade."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, ScalarFormatter

    axes.set(xscale="log", yscale="log")
    for axis, formatter in (
        (axes.xaxis, EngFormatter(sep="")),
        (axes.yaxis, ScalarFormatter()),
    ):
        low, high = axis.get_view_interval()
        subs = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0) if high > 5 * low else _FINE_TICKS
        axis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axis.set_major_formatter(formatter)
        axis.set_minor_formatter(NullFormatter())


_FINE_TICKS = tuple(round(1 + step / 4, 2) for step in range(36))


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average groups of neighbouring points, so that at most `_MAX_POINTS` remain."""
    size = -(-len(points) // _MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if points else []
    return [(group[-1][0], fmean(value for _, value in group)) for group in groups]


def smoothed(values: Sequence[float]) -> list[float]:
    """Return a centred moving average, which has no lag."""
    last, max_radius = len(values) - 1, len(values) // 40
    radii = [min(max_radius, i, last - i) for i in range(len(values))]
    return [fmean(values[i - r : i + r + 1]) for i, r in enumerate(radii)]
