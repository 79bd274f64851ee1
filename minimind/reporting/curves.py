"""Sections with training curves: loss, learning rate, throughput, memory, experts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minimind.reporting.page import Page, Plots
from minimind.reporting.plots import Line, draw
from minimind.reporting.runs import Axis, Run

AXES: dict[Axis, str] = {"tokens": "tokens", "seconds": "seconds of training"}
_FEW_LINES = 4  # a plot with more has a long legend


@dataclass(frozen=True)
class Plot:
    """A drawing and its number of lines."""

    title: str
    drawing: str
    lines: int


@dataclass(frozen=True)
class _Curve:
    """A section with the curves of a metric in metrics.jsonl.

    key: the metric's name, or a prefix of several metrics that ends with a slash. applies_to: True
    for runs whose curves are drawn.
    """

    title: str
    about: str
    key: str
    label: str
    axes: tuple[Axis, ...] = ("tokens",)
    from_zero: bool = False
    applies_to: Callable[[Run], bool] = lambda run: run.kind != "dpo" and not _is_preference(run)


def _has(run: Run, prefix: str) -> bool:
    return any(name.startswith(prefix) for line in run.history for name in line)


def _is_preference(run: Run) -> bool:
    return _has(run, "rewards/")


def _has_experts(run: Run) -> bool:
    return _has(run, "expert_load/")


_CURVES = [
    _Curve(
        "Loss",
        "Cross-entropy of the next token, in nats; 0 would be a perfect prediction. A good curve "
        "falls fast, then slowly, with validation (text that is not trained on) close to train. "
        "Validation that rises while train falls means overfitting. A retention line shows the "
        "loss on general data; if it rises, the model forgets.",
        "loss",
        "nats per token",
        ("tokens", "seconds"),
    ),
    _Curve(
        "Bits per byte",
        "The loss in bits per byte of text, which does not depend on the tokenizer. Lower is "
        "better. The dashed line is a unigram model, which knows only how often each token "
        "occurs; a good model is far below it.",
        "bits_per_byte",
        "bits per byte",
        ("tokens", "seconds"),
        from_zero=True,
    ),
    _Curve(
        "Learning rate",
        "The step size of the optimizer. A short warmup keeps the start stable, and the decay at "
        "the end lets the model settle.",
        "lr/",
        "learning rate",
        from_zero=True,
        applies_to=lambda run: True,
    ),
    _Curve(
        "Tokens per second",
        "Training throughput. A flat line is good; a deep dip means that the machine was busy "
        "with something else.",
        "tokens_per_second",
        "tokens per second",
        from_zero=True,
        applies_to=lambda run: True,
    ),
    _Curve(
        "Memory",
        "Peak memory up to each step: on a GPU that of tensors, elsewhere that of the process. A "
        "line that stays flat after the first steps is good.",
        "peak_memory_bytes",
        "bytes",
        from_zero=True,
        applies_to=lambda run: _has(run, "peak_memory_bytes"),
    ),
    _Curve(
        "Expert load",
        "The fraction of routed tokens that each expert receives, and the maximum and minimum "
        "over all experts and layers. Lines near the even share are good; an expert at zero learns "
        "nothing.",
        "expert_load/",
        "fraction",
        from_zero=True,
        applies_to=_has_experts,
    ),
    _Curve(
        "Dropped tokens",
        "Token-to-expert assignments that were not computed; always zero. Tokens are sorted by "
        "expert, and no expert has a capacity limit.",
        "dropped_tokens",
        "assignments",
        applies_to=_has_experts,
    ),
    _Curve(
        "Router entropy",
        "The entropy of the router's probabilities, in nats per token: the logarithm of the "
        "number of experts if all are equally likely, 0 if one expert has all probability. A slow "
        "fall with an even load is good.",
        "router_entropy",
        "nats per token",
        from_zero=True,
        applies_to=_has_experts,
    ),
]
_PREFERENCE_METRICS = {
    "loss": "loss per pair",
    "rewards/": "reward",
    "accuracy": "accuracy",
    "logps/": "log-probability",
}
_ABOUT_PREFERENCES = (
    "Preference optimization: learning which of two answers is better. The loss starts at 0.693, "
    "which is ln 2 (another value with ipo), and should fall. The reward of an answer is "
    "proportional to the change of its log-probability since the start; chosen answers should have "
    "a higher reward than rejected ones. The accuracy is the fraction of pairs where they do. "
    "Log-probabilities are in nats per answer. Those of rejected answers should fall. If those of "
    "chosen answers also fall far, the model gets worse at both."
)


def add_curves(page: Page, chains: Sequence[Sequence[Run]]) -> None:
    """Add a section per metric."""
    compare = len(chains) > 1
    runs = [run for chain in chains for run in chain]
    for curve in _CURVES:
        selected = [run for run in runs if curve.applies_to(run)]
        plots = [
            plot
            for axis in curve.axes
            for plot in _plots(selected, compare, curve.key, curve.label, axis, curve.from_zero)
        ]
        page.add(curve.title, curve.about, side_by_side(plots))
        if curve.key == "bits_per_byte":
            selected = [run for run in runs if _is_preference(run)]
            plots = [
                plot
                for key, label in _PREFERENCE_METRICS.items()
                for plot in _plots(selected, compare, key, label, "tokens", name=label)
            ]
            page.add("Preferences", _ABOUT_PREFERENCES, side_by_side(plots))


def side_by_side(plots: Sequence[Plot]) -> Plots | None:
    """Return a block of plots, None if there are none."""
    if not plots:
        return None
    wide = any(plot.lines > _FEW_LINES for plot in plots)
    return Plots([(plot.title, plot.drawing) for plot in plots], wide)


def _plots(
    runs: Sequence[Run],
    compare: bool,
    key: str,
    label: str,
    axis: Axis,
    from_zero: bool = False,
    name: str = "",
) -> list[Plot]:
    """Draw one plot per stage; to compare runs, one plot per kind of stage with a line per run."""
    groups = _lines_by_kind(runs, key, axis) if compare else _lines_by_run(runs, key, axis)
    plots = []
    for group, lines in groups.items():
        if not lines:
            continue
        level = None
        if key == "bits_per_byte" and not compare:
            level = _unigram_level(runs, group)
        salt = f"{key} {axis} {group}"
        drawing = draw(lines, AXES[axis], label, salt=salt, from_zero=from_zero, level=level)
        title = f"{group}: {name}" if name else group
        title += ", by time" if axis == "seconds" else ""
        plots.append(Plot(title, drawing, len(lines)))
    return plots


def _lines_by_run(runs: Sequence[Run], key: str, axis: Axis) -> dict[str, list[Line]]:
    return {
        run.name: [
            Line(kind, points, "train" if kind != "validation" else "measured")
            for kind, points in run.curves(key, axis).items()
        ]
        for run in runs
    }


def _lines_by_kind(runs: Sequence[Run], key: str, axis: Axis) -> dict[str, list[Line]]:
    """Return one line per run by kind of stage: validation if the run has it."""
    groups: dict[str, list[Line]] = {}
    for run in runs:
        curves = run.curves(key, axis)
        if key.endswith("/"):
            for kind, points in curves.items():
                groups.setdefault(f"{run.kind} {kind}", []).append(Line(run.name, points, "train"))
        elif curves:
            kind = "validation" if "validation" in curves else next(iter(curves))
            line = Line(run.name, curves[kind], "measured" if kind == "validation" else "train")
            groups.setdefault(run.kind, []).append(line)
    return groups


def _unigram_level(runs: Sequence[Run], name: str) -> tuple[str, float] | None:
    [run] = [run for run in runs if run.name == name]
    unigram = run.summary.get("unigram_bits_per_byte")
    return ("unigram", unigram) if isinstance(unigram, int | float) else None
