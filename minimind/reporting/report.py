"""`report.html` and `report.md`: what runs did, from what they have left in their directories."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind.errors import DataError
from minimind.reporting.pages import Bar, Cell, Folded, Page, Plots, Problems, Table, Title, write
from minimind.reporting.plots import Line, draw
from minimind.reporting.runs import Axis, Found, Metrics, Run, find
from minimind.reporting.scaling import Point, PowerLaw, fit_power_law, frontier

_MAX_SAMPLES = 40
_AXES: dict[Axis, str] = {"tokens": "tokens", "seconds": "seconds of training"}
_FEW_LINES = 4  # more need a wide drawing


@dataclass
class Report:
    """A page, the same as figures for programs, and what could not be read.

    It is complete when every place held something, be it damaged.
    """

    page: Page
    metrics: Metrics
    problems: list[str]
    complete: bool

    def write(self, path: Path) -> None:
        """The page at `path`, and Markdown beside it."""
        write(self.page, path)


def make_report(places: Sequence[Path], *, price: float | None = None) -> Report:
    """A report of what is in the places; `price` is that of an hour of training.

    One chain of runs is shown stage by stage, several on the same axes. Raises DataError when
    there is nothing in any of them.
    """
    found = find(places)
    if not found.chains and not found.exams:
        raise DataError("; ".join(found.missing) or "no run is given")
    title = " · ".join(place.resolve().name for place in places[:4])
    title += f" and {len(places) - 4} more" if len(places) > 4 else ""
    runs = found.runs
    several = len(found.chains) > 1
    metrics: Metrics = {
        "runs": {run.name: _run_metrics(run, price) for run in runs},
        "exams": found.exams,
        "problems": _problems(found),
    }
    page = Page(f"minimind: {title}", _lead(found), _cards(found, price))
    page.add("Problems", _ABOUT["Problems"], Problems(_problems(found)))
    _add_demo_answers(page, found.demo)
    name = "Runs" if several else "Stages"
    page.add(name, _ABOUT[name], _stage_table(found, price))
    if several:
        metrics["fits"] = _add_scaling(page, found)
    _add_curves(page, found.chains)
    _add_exams(page, found.exams)
    _add_demo_quiz(page, found.demo)
    page.add(
        "What the model wrote on the way",
        _ABOUT["Samples"],
        *(block for run in runs for block in _samples(run)),
    )
    recipes = [Folded(run.name, run.recipe) for run in runs if run.recipe]
    page.add("Recipes", _ABOUT["Recipes"], *recipes)
    return Report(page, metrics, _problems(found), complete=not found.missing)


_ABOUT = {
    "Problems": "What could not be read, or is not finished. All the rest of this page is of what "
    "is there.",
    "Stages": "Each stage starts from the model that the one before has left, at its last step; "
    "the best step is that of the best validation. Loss and bits per byte are those on held-out "
    "data at the end. Fine-tuning counts the answers alone, so "
    "its figures say nothing when put beside those of pretraining.",
    "Runs": "One line a run. Loss and bits per byte are those on held-out data at the end; runs "
    "with other tokenizers are compared by bits per byte alone, and any two only on the same data.",
    "Samples": "The same prompts continued at each evaluation. Good is text that grows from "
    "repeated words into sentences, and from sentences into true ones.",
    "Recipes": "Every setting of each stage. Given such a file, minimind train runs the stage "
    "again.",
}


@dataclass(frozen=True)
class _Curve:
    """A section with a figure of metrics.jsonl; `of` says which runs have it."""

    title: str
    about: str
    key: str
    label: str
    axes: tuple[Axis, ...] = ("tokens",)
    from_zero: bool = False
    of: Callable[[Run], bool] = lambda run: run.kind != "dpo" and not _has(run, "rewards/")


def _has(run: Run, key: str) -> bool:
    return any(name.startswith(key) for line in run.history for name in line)


_CURVES = [
    _Curve(
        "Loss",
        "How surprised the model is by the next token, in nats: 0 would mean never. Good is a "
        "curve that falls fast, then slowly, with validation (text that is not trained on) "
        "close to train. If validation rises while train falls, the model learns by heart. "
        "Where general data has a line, its rise shows how much of that is being forgotten.",
        "loss",
        "nats per token",
        ("tokens", "seconds"),
    ),
    _Curve(
        "Bits per byte",
        "How many bits the model needs for each byte of text: the loss again, but in a unit "
        "that does not depend on the tokenizer. Lower is better. The dashed line is a model "
        "that knows only how often each token occurs; good is far below it.",
        "bits_per_byte",
        "bits per byte",
        ("tokens", "seconds"),
        from_zero=True,
    ),
    _Curve(
        "Learning rate",
        "How big a step each update of the weights may take. Good is a short rise, so that "
        "the start is calm, and a fall at the end, so that the model settles.",
        "lr/",
        "learning rate",
        from_zero=True,
        of=lambda run: True,
    ),
    _Curve(
        "Tokens per second",
        "How much text is read each second. Good is a flat line; a deep dip means that the "
        "machine was busy with something else.",
        "tokens_per_second",
        "tokens per second",
        from_zero=True,
        of=lambda run: True,
    ),
    _Curve(
        "Memory",
        "The most that was in use at once up to then: of tensors on a GPU, elsewhere of the whole "
        "process. Good is a line that stays flat after the first steps.",
        "peak_memory_bytes",
        "bytes",
        from_zero=True,
        of=lambda run: _has(run, "peak_memory_bytes"),
    ),
    _Curve(
        "Expert load",
        "The share of all choices of the router that falls on each expert, and the most and "
        "least that any expert of any layer gets. Good is every line near the even share; one "
        "at zero is an expert that learns nothing.",
        "expert_load/",
        "share",
        from_zero=True,
        of=lambda run: _has(run, "expert_load/"),
    ),
    _Curve(
        "Dropped tokens",
        "Choices of the router that no expert has computed. Good is zero all along: tokens are "
        "sorted by expert, so that none has to be left out when many want the same one.",
        "dropped_tokens",
        "choices",
        of=lambda run: _has(run, "expert_load/"),
    ),
    _Curve(
        "Router entropy",
        "How undecided the router is, in nats a token: the logarithm of the number of experts "
        "means that it does not care, 0 that it always sees one expert alone. Good is a slow "
        "fall while the load stays even.",
        "router_entropy",
        "nats per token",
        from_zero=True,
        of=lambda run: _has(run, "expert_load/"),
    ),
]
_PREFERENCES = {
    "loss": "loss per pair",
    "rewards/": "reward",
    "accuracy": "accuracy",
    "logps/": "log-probability",
}
_ABOUT_PREFERENCES = (
    "Learning which of two answers is better. The loss begins at 0.693, the logarithm of "
    "2 (with ipo elsewhere), and should fall. The reward of an answer says how much "
    "likelier than at the start it is now: good is a reward of the chosen answers above "
    "that of the rejected ones. The accuracy is the share of pairs in which that is so. "
    "Log-probabilities are nats an answer: those of the rejected ones should fall; where "
    "those of the chosen ones fall far too, the model forgets how to talk."
)


def _add_curves(page: Page, chains: Sequence[Sequence[Run]]) -> None:
    several = len(chains) > 1
    runs = [run for chain in chains for run in chain]
    for curve in _CURVES:
        wanted = [run for run in runs if curve.of(run)]
        plots = [
            plot
            for axis in curve.axes
            for plot in _plots(wanted, several, curve.key, curve.label, axis, curve.from_zero)
        ]
        page.add(curve.title, curve.about, _grid(plots))
        if curve.key == "bits_per_byte":
            pairs = [run for run in runs if _has(run, "rewards/")]
            plots = [
                plot
                for key, label in _PREFERENCES.items()
                for plot in _plots(pairs, several, key, label, "tokens", name=label)
            ]
            page.add("Preferences", _ABOUT_PREFERENCES, _grid(plots))


@dataclass(frozen=True)
class _Plot:
    title: str
    drawing: str
    lines: int


def _grid(plots: Sequence[_Plot]) -> Plots | None:
    """Side by side; what has a long legend needs room."""
    if not plots:
        return None
    return Plots([(p.title, p.drawing) for p in plots], any(p.lines > _FEW_LINES for p in plots))


def _plots(
    runs: Sequence[Run],
    several: bool,
    key: str,
    label: str,
    axis: Axis,
    from_zero: bool = False,
    name: str = "",
) -> list[_Plot]:
    """A plot a stage; of several chains a plot a kind of stage, with a line a run."""
    groups: dict[str, list[Line]] = {}
    levels: dict[str, float] = {}
    for run in runs:
        curves = run.curves(key, axis)
        if not several:
            groups[run.name] = [
                Line(kind, points, "train" if kind != "validation" else "measured")
                for kind, points in curves.items()
            ]
            unigram = run.summary.get("unigram_bits_per_byte")
            if key == "bits_per_byte" and isinstance(unigram, int | float):
                levels[run.name] = unigram
        elif key.endswith("/"):
            for kind, points in curves.items():
                groups.setdefault(f"{run.kind} {kind}", []).append(Line(run.name, points, "train"))
        elif curves:
            kind = "validation" if "validation" in curves else next(iter(curves))
            line = Line(run.name, curves[kind], "measured" if kind == "validation" else "train")
            groups.setdefault(run.kind, []).append(line)
    plots = []
    for group, lines in groups.items():
        if not lines:
            continue
        level = ("unigram", levels[group]) if group in levels else None
        salt = f"{key} {axis} {group}"
        drawing = draw(lines, _AXES[axis], label, salt=salt, from_zero=from_zero, level=level)
        title = f"{group}: {name}" if name else group
        title += ", by time" if axis == "seconds" else ""
        plots.append(_Plot(title, drawing, len(lines)))
    return plots


def _number(metrics: Mapping[str, Any], key: str) -> float | None:
    """A figure, None where it is missing or no number."""
    value = metrics.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _metric(metrics: Mapping[str, Any], key: str, form: str) -> str:
    value = _number(metrics, key)
    return "–" if value is None else format(value, form)


def _cost(metrics: Mapping[str, Any], price: float | None) -> float | None:
    seconds = _number(metrics, "seconds")
    return None if price is None or seconds is None else seconds / 3600 * price


def _run_metrics(run: Run, price: float | None) -> Metrics:
    cost = _cost(run.metrics, price)
    more = {} if cost is None else {"cost": cost}
    return {"kind": run.kind, "finished": run.finished, **run.metrics, **more}


def _stage_table(found: Found, price: float | None) -> Table:
    columns = [
        ("parameters", "parameters", ",.0f"),
        ("steps", "steps", ",.0f"),
        ("best step", "best_step", ",.0f"),
        ("tokens", "tokens", ",.0f"),
        ("seconds", "seconds", ",.0f"),
        ("tokens/s", "tokens_per_second", ",.0f"),
        ("loss", "loss", ".3f"),
        ("bits/byte", "bits_per_byte", ".3f"),
        ("unigram", "unigram_bits_per_byte", ".3f"),
        ("peak memory", "", ""),
        *([("cost", "", "")] if price is not None else []),
    ]

    def cell(run: Run, title: str, key: str, form: str) -> str:
        if title == "peak memory":
            peak = _number(run.metrics, "peak_memory_bytes")
            return "–" if peak is None else f"{peak / (1 << 20):,.0f} MB"
        if title == "cost":
            cost = _cost(run.metrics, price)
            return "–" if cost is None else f"{cost:,.2f}"
        return _metric(run.metrics, key, form)

    columns = [c for c in columns if any(cell(run, *c) != "–" for run in found.runs)]
    rows: list[list[Cell]] = []
    for run in found.runs:
        name = run.name if run.finished else f"{run.name} (not finished)"
        rows.append([name, *(cell(run, *column) for column in columns)])
    head = ["run" if len(found.chains) > 1 else "stage", *(title for title, _, _ in columns)]
    return Table(head, rows, range(1, len(head)))


def _problems(found: Found) -> list[str]:
    of_runs = [f"{run.name}: {problem}" for run in found.runs for problem in run.problems]
    return [*found.missing, *found.failed, *of_runs]


def _lead(found: Found) -> str:
    if len(found.chains) != 1:
        return f"{len(found.chains)} runs side by side." if found.chains else "Results of exams."
    first = found.chains[0][0]
    metrics, training = first.metrics, _seconds(found)
    whole = _number(metrics, "parameters")
    size = f"A GPT of {whole:,.0f} parameters" if whole else "A GPT"
    return f"{size}, trained on {metrics.get('device', '–')} in {training / 60:.1f} minutes."


def _seconds(found: Found) -> float:
    return sum(_number(run.metrics, "seconds") or 0.0 for run in found.runs)


def _cards(found: Found, price: float | None) -> dict[str, str]:
    """The figures that one looks for first."""
    cards: dict[str, str] = {}
    if found.chains:
        cards["training"] = f"{_seconds(found):,.0f} s"
        tokens = sum(_number(run.metrics, "tokens") or 0 for run in found.runs)
        cards["tokens"] = f"{tokens / 1e6:,.1f} M" if tokens >= 1e5 else f"{tokens:,.0f}"
    if price is not None:
        cards["cost"] = f"{_seconds(found) / 3600 * price:,.2f}"
    quiz = found.demo.get("quiz", {})
    if quiz.get("questions"):
        cards["quiz"] = f"{quiz['correct'] / quiz['questions']:.1%}"
    if eight := found.demo.get("eight"):
        cards["of the eight"] = f"{sum(one['correct'] for one in eight)} right"
    pretrained = [run for run in found.runs if run.kind == "pretrain"]
    bits = [_number(run.metrics, "bits_per_byte") for run in pretrained]
    measured = [value for value in bits if value is not None]
    if measured:
        name = "bits per byte" if len(measured) == 1 else "best bits per byte"
        cards[name] = f"{min(measured):.3f}"
    if len(pretrained) == 1:
        unigram = _number(pretrained[0].metrics, "unigram_bits_per_byte")
        cards |= {} if unigram is None else {"unigram": f"{unigram:.3f}"}
    if "accuracy" in found.demo.get("preferences", {}):
        cards["pairs told apart"] = f"{found.demo['preferences']['accuracy']:.1%}"
    identity = found.demo.get("identity", {})
    if identity.get("questions"):
        cards["knows its name"] = f"{identity['correct'] / identity['questions']:.0%}"
    return cards


def _samples(run: Run) -> list[Title | Table]:
    """A row an evaluation, the last always among them; a column a prompt."""
    by_step: dict[int, dict[str, str]] = {}
    for line in run.history:
        if line["kind"] == "sample":
            texts = by_step.setdefault(line["step"], {})
            texts[str(line.get("prompt", ""))] = str(line.get("text", ""))
    if not by_step:
        return []
    prompts = list(dict.fromkeys(prompt for texts in by_step.values() for prompt in texts))
    every = max(1, -(-len(by_step) // _MAX_SAMPLES))
    shown = list(by_step.items())[::-every][::-1]
    rows = [[f"{step:,}", *(texts.get(prompt, "") for prompt in prompts)] for step, texts in shown]
    return [Title(run.name), Table(["step", *prompts], rows, (0,), "texts")]


# What only several runs have.

_ABOUT_SCALING = (
    "How the loss falls with more parameters, tokens and time, both axes logarithmic, with a power "
    "law where one can be fitted. By parameters, a point is a finished run. By tokens and time, "
    "the fit is through the lowest loss that any of the runs had reached by then, without the "
    "first tenth: of a run whose learning rate has not fallen yet, that is above what a run of "
    "just that length would give. R² says how much of the loss's logarithm the law explains, of "
    "these runs; beyond them it is a guess."
)
_SYMBOLS = {"parameters": "N", "tokens": "D", "seconds": "t"}


def _add_scaling(page: Page, found: Found) -> Metrics:
    """Loss by parameters, tokens, time and what was varied; the fits as figures."""
    runs = [run for run in found.runs if run.kind in ("pretrain", "sft")]
    kinds = {kind: [run for run in runs if run.kind == kind] for kind in ("pretrain", "sft")}
    metrics: Metrics = {}
    for kind, some in kinds.items():
        if len(some) < 2:
            continue
        one_tokenizer = len({run.settings.get("tokenizer") for run in some}) == 1
        key, unit = ("loss", "nats per token") if one_tokenizer else ("bits_per_byte",) * 2
        unit = unit.replace("_", " ")
        ends = [
            (float(size), float(loss))
            for run in some
            if run.finished
            and (size := _number(run.metrics, "parameters"))
            and (loss := _number(run.metrics, key))
        ]
        by_axis = {"parameters": ends}
        measured: dict[str, list[Line]] = {"parameters": [Line("runs", ends, "points")]}
        for axis in _AXES:
            lines = [
                Line(run.name, [p for p in curves["validation"] if p[0] > 0])
                for run in some
                if "validation" in (curves := run.curves(key, axis))
            ]
            measured[axis] = [line for line in lines if line.points]
            by_axis[axis] = _late([line.points for line in measured[axis]])
        fits = {axis: fit_power_law(points) for axis, points in by_axis.items()}
        plots = [
            _scaling_plot(axis, measured[axis], by_axis[axis], fit, unit, kind)
            for axis, fit in fits.items()
            if measured[axis] and any(line.points for line in measured[axis])
        ]
        rows: list[list[Cell]] = [_fit_row(axis, fit) for axis, fit in fits.items()]
        table = Table(["by", "power law", "R²", "points"], rows, (2, 3))
        page.add(f"Scaling: {kind}", _ABOUT_SCALING, table, _grid(plots))
        page.add(
            f"By setting: {kind}",
            "The loss at the end by each setting that was varied, a point a run. Where several "
            "settings change together, their plots show the same runs.",
            _grid(_setting_plots(some, found.swept, key, unit)),
            _setting_table(some, found.swept, key),
        )
        metrics[kind] = {
            axis: vars(fit) if isinstance(fit, PowerLaw) else {"reason": fit}
            for axis, fit in fits.items()
        }
    return metrics


def _late(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """The frontier without the first tenth of the axis, where warming up says little."""
    points = frontier(curves)
    return [point for point in points if point[0] >= 0.1 * points[-1][0]]


def _fit_row(axis: str, fit: PowerLaw | str) -> list[Cell]:
    name = axis if axis == "parameters" else _AXES["tokens" if axis == "tokens" else "seconds"]
    if isinstance(fit, str):
        return [name, fit, "–", "–"]
    return [name, fit.formula(_SYMBOLS[axis]), f"{fit.r_squared:.3f}", str(fit.points)]


def _scaling_plot(
    axis: str,
    measured: Sequence[Line],
    points: Sequence[Point],
    fit: PowerLaw | str,
    unit: str,
    kind: str,
) -> _Plot:
    lines = list(measured)
    if isinstance(fit, PowerLaw):
        low, high = min(x for x, _ in points), max(x for x, _ in points)
        steps = [low * (high / low) ** (step / 40) for step in range(41)]
        lines.append(Line(fit.formula(_SYMBOLS[axis]), [(x, fit.at(x)) for x in steps], "fit"))
    across = axis if axis != "seconds" else _AXES["seconds"]
    salt = f"scaling {kind} {axis}"
    drawing = draw(lines, across, unit, salt=salt, logarithmic=True)
    return _Plot(f"by {across}", drawing, len(lines))


def _setting_plots(
    runs: Sequence[Run], swept: Mapping[str, Metrics], key: str, unit: str
) -> list[_Plot]:
    plots = []
    for setting in _varied(runs, swept):
        points = [
            (float(value), loss)
            for run in runs
            if (value := _number(swept.get(run.name, {}), setting)) is not None
            and (loss := _number(run.metrics, key)) is not None
            and run.finished
        ]
        if len({x for x, _ in points}) > 1 and setting != "seed":
            line = Line("runs", sorted(points), "points")
            plots.append(_Plot(setting, draw([line], setting, unit, salt=f"by {setting}"), 1))
    return plots


def _setting_table(runs: Sequence[Run], swept: Mapping[str, Metrics], key: str) -> Table | None:
    settings = _varied(runs, swept)
    rows: list[list[Cell]] = [
        [
            run.name,
            *(str(swept.get(run.name, {}).get(setting, "–")) for setting in settings),
            _metric(run.metrics, key, ".4f"),
        ]
        for run in runs
    ]
    head = ["run", *settings, key.replace("_", " ")]
    return Table(head, rows, range(1, len(head))) if settings else None


def _varied(runs: Sequence[Run], swept: Mapping[str, Metrics]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in swept.get(run.name, {})))


# Exams, and what the demo alone has.


def _add_exams(page: Page, exams: Sequence[Metrics]) -> None:
    rows: list[list[Cell]] = []
    for one in exams:
        low, high = one.get("interval") or (None, None)
        correct, asked = _number(one, "correct"), _number(one, "questions")
        bits, share = _number(one, "bits_per_byte"), _number(one, "accuracy")
        if bits is not None:
            spread = "–" if low is None else f"{low:.4f} – {high:.4f}"
            score, told = f"{bits:.4f} bits/byte", f"{_metric(one, 'documents', ',.0f')} documents"
        elif share is not None:
            spread = "–" if low is None else f"{low:.1%} – {high:.1%}"
            score, told = f"{share:.2%}", f"{correct or 0:,.0f} / {asked or 0:,.0f}"
        else:
            scores = one.get("metrics") or {}
            score = ", ".join(f"{name} {_metric(scores, name, '.4g')}" for name in scores) or "–"
            spread = told = "–"
        rows.append([str(one["model"]), str(one["task"]), score, spread])
        rows[-1] += [_metric(one, "chance", ".1%"), told, _metric(one, "fluent", ",.0f")]
        rows[-1].append(_metric(one, "failed", ",.0f"))
    head = ["model", "task", "score", "95 %", "chance", "correct / questions", "fluent", "failed"]
    by_group: list[Title | Table] = []
    for one in exams:
        groups = one.get("by_group")
        if isinstance(groups, dict) and groups:
            by_group.append(Title(f"{one['model']}: {one['task']}"))
            shares = {
                name: (int(_number(g, "correct") or 0), int(_number(g, "questions") or 0))
                for name, g in groups.items()
            }
            by_group.append(_shares("group", shares))
    page.add(
        "Exams",
        "Results of minimind eval. A score is worth its interval: two that overlap are not told "
        "apart. Beside it is what guessing gives.",
        Table(head, rows, range(2, 8)),
        *by_group,
    )


def _shares(name: str, parts: Mapping[str, tuple[int, int]]) -> Table:
    """Right of asked as bars, the weakest first."""
    ordered = sorted(parts.items(), key=lambda item: item[1][0] / max(item[1][1], 1))
    rows: list[list[Cell]] = []
    for part, (right, asked) in ordered:
        share = right / max(asked, 1)
        rows.append([part, Bar(share), f"{right}/{asked}", f"{share:.0%}"])
    return Table([name, "", "right", ""], rows, (2, 3))


def _add_demo_answers(page: Page, demo: Metrics) -> None:
    moments = {
        "before_training": "before training",
        "after_pretraining": "after pretraining",
        "after_fine_tuning": "after fine-tuning",
        "after_preferences": "after preferences",
    }
    rows: list[list[Cell]] = [
        [
            *(str(row.get(key, "")) for key in ("question", *moments)),
            *(bool(row[key]) if key in row else "–" for key in ("correct", "fluent")),
        ]
        for row in demo.get("eight", [])
    ]
    page.add(
        "The eight questions",
        "The same questions at four moments. Before training the model writes noise; after "
        "pretraining it knows words but seldom the answer; after fine-tuning it should answer "
        "in one whole sentence, and learning preferences should keep it so. Of the last answers: "
        "keywords, whether they hold the words that tell a right answer and none that tells a "
        "wrong one; fluent, whether they are made as the textbook's sentences are.",
        Table(["question", *moments.values(), "keywords", "fluent"], rows, kind="texts"),
    )


def _add_demo_quiz(page: Page, demo: Metrics) -> None:
    quiz = demo.get("quiz", {})
    by_subject = {
        name: (one["correct"], one["questions"]) for name, one in quiz.get("by_subject", {}).items()
    }
    fluent = f"; {quiz['fluent']} answers are fluent" if "fluent" in quiz else ""
    head = ["question", "answer", "expected"]
    wrong: list[list[Cell]] = [[str(one[key]) for key in head] for one in quiz.get("wrong", [])]
    page.add(
        "Quiz by subject",
        "Questions in words that were never trained on, scored by keywords, the weakest subject "
        f"first{fluent}. Good is a "
        "long bar everywhere; a short bar shows what the model has not understood.",
        _shares("subject", by_subject),
        Folded(f"{len(wrong):,} wrong answers", Table(head, wrong, kind="texts"))
        if wrong
        else None,
    )
    answers: list[list[Cell]] = [
        [*(str(row[key]) for key in ("question", "before", "after")), bool(row["right"])]
        for row in demo.get("identity", {}).get("answers", [])
    ]
    page.add(
        "A name of its own",
        "Asked who it is, in words never trained on, without and with the adapter that LoRA "
        "trained beside the model. ✓ marks an answer that says the name or the author that "
        "was asked for.",
        Table(["question", "without the adapter", "with it", ""], answers, kind="texts"),
    )
