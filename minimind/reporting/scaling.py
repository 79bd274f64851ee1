"""Sections that compare several runs: scaling laws, and the loss by each setting that varies."""

from collections.abc import Sequence
from dataclasses import dataclass

from minimind.reporting.curves import AXES, Plot, side_by_side
from minimind.reporting.formatting import format_metric, number_of
from minimind.reporting.page import Cell, Page, Table
from minimind.reporting.plots import Line, draw
from minimind.reporting.power_law import Point, PowerLaw, fit_power_law, frontier
from minimind.reporting.runs import Metrics, Run

_ABOUT = (
    "How the loss falls with parameters, tokens and time, on logarithmic axes, with a fitted power "
    "law where possible. By parameters, each point is a finished run. By tokens and time, the law "
    "is fitted to the lowest loss that any run had reached at that point, without the first tenth. "
    "That loss is higher than the final loss of a run of this length, because the learning rate "
    "had not decayed yet. R² is the fraction of the variance of log loss that the law explains. "
    "Outside the range of these runs the law is an extrapolation."
)
_SYMBOLS = {"parameters": "N", "tokens": "D", "seconds": "t"}
_NAMES = {"parameters": "parameters", "tokens": AXES["tokens"], "seconds": AXES["seconds"]}


@dataclass(frozen=True)
class _Axis:
    """The lines of one plot, the points that the law is fitted to, and the fit."""

    lines: Sequence[Line]
    points: Sequence[Point]
    fit: PowerLaw | str


def add_scaling(page: Page, runs: Sequence[Run]) -> Metrics:
    """Add sections on scaling and on settings; return the fits as metrics."""
    metrics: Metrics = {}
    for kind in ("pretrain", "sft"):
        selected = [run for run in runs if run.kind == kind]
        if len(selected) < 2:
            continue
        same_tokenizer = len({run.tokenizer() for run in selected}) == 1
        key = "loss" if same_tokenizer else "bits_per_byte"
        unit = "nats per token" if same_tokenizer else "bits per byte"
        axes = _fit_axes(selected, key)
        plots = [
            _scaling_plot(name, axis, unit, kind)
            for name, axis in axes.items()
            if any(line.points for line in axis.lines)
        ]
        rows: list[list[Cell]] = [_fit_row(name, axis.fit) for name, axis in axes.items()]
        table = Table(["by", "power law", "R²", "points"], rows, (2, 3))
        page.add(f"Scaling: {kind}", _ABOUT, table, side_by_side(plots))
        page.add(
            f"By setting: {kind}",
            "The final loss by each setting that varies, one point per run. If several settings "
            "vary together, their plots show the same runs.",
            side_by_side(_setting_plots(selected, key, unit)),
            _setting_table(selected, key),
        )
        metrics[kind] = {
            name: vars(axis.fit) if isinstance(axis.fit, PowerLaw) else {"reason": axis.fit}
            for name, axis in axes.items()
        }
    return metrics


def _fit_axes(runs: Sequence[Run], key: str) -> dict[str, _Axis]:
    """Fit the loss by parameters, tokens and time."""
    final = [
        (float(size), float(loss))
        for run in runs
        if run.finished
        and (size := number_of(run.metrics, "parameters"))
        and (loss := number_of(run.metrics, key))
    ]
    axes = {"parameters": _Axis([Line("runs", final, "points")], final, fit_power_law(final))}
    for axis in AXES:
        lines = [
            Line(run.name, [point for point in curves["validation"] if point[0] > 0])
            for run in runs
            if "validation" in (curves := run.curves(key, axis))
        ]
        lines = [line for line in lines if line.points]
        points = frontier([line.points for line in lines])
        # The first tenth is mostly warmup.
        points = [point for point in points if point[0] >= 0.1 * points[-1][0]]
        axes[axis] = _Axis(lines, points, fit_power_law(points))
    return axes


def _fit_row(name: str, fit: PowerLaw | str) -> list[Cell]:
    if isinstance(fit, str):
        return [_NAMES[name], fit, "–", "–"]
    return [_NAMES[name], fit.formula(_SYMBOLS[name]), f"{fit.r_squared:.3f}", str(fit.points)]


def _scaling_plot(name: str, axis: _Axis, unit: str, kind: str) -> Plot:
    lines = list(axis.lines)
    if isinstance(axis.fit, PowerLaw):
        low, high = min(x for x, _ in axis.points), max(x for x, _ in axis.points)
        xs = [low * (high / low) ** (step / 40) for step in range(41)]
        formula = axis.fit.formula(_SYMBOLS[name])
        lines.append(Line(formula, [(x, axis.fit.at(x)) for x in xs], "fit"))
    salt = f"scaling {kind} {name}"
    drawing = draw(lines, _NAMES[name], unit, salt=salt, logarithmic=True)
    return Plot(f"by {_NAMES[name]}", drawing, len(lines))


def _setting_plots(runs: Sequence[Run], key: str, unit: str) -> list[Plot]:
    plots = []
    for setting in _varied_settings(runs):
        points = [
            (float(value), loss)
            for run in runs
            if (value := number_of(run.varied, setting)) is not None
            and (loss := number_of(run.metrics, key)) is not None
            and run.finished
        ]
        if len({x for x, _ in points}) > 1 and setting != "seed":
            line = Line("runs", sorted(points), "points")
            plots.append(Plot(setting, draw([line], setting, unit, salt=f"by {setting}"), 1))
    return plots


def _setting_table(runs: Sequence[Run], key: str) -> Table | None:
    settings = _varied_settings(runs)
    rows: list[list[Cell]] = [
        [
            run.name,
            *(str(run.varied.get(setting, "–")) for setting in settings),
            format_metric(run.metrics, key, ".4f"),
        ]
        for run in runs
    ]
    head = ["run", *settings, key.replace("_", " ")]
    return Table(head, rows, range(1, len(head))) if settings else None


def _varied_settings(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run.varied))
