"""`report.html`: one self-contained page that shows what a run did."""

import html
import io
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8882; --good: #2a9d5c; --bad: #d9583b; }
* { box-sizing: border-box; }
body { font: 16px/1.6 system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC",
       "Noto Sans SC", sans-serif;
       max-width: 66rem; margin: 0 auto; padding: 1rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.8rem; margin: 1rem 0 .2rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .2rem; }
p { margin: 0 0 .9rem; max-width: 48rem; }
.faint { opacity: .75; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .8rem;
         margin: 1.2rem 0; }
.card { border: 1px solid var(--line); border-radius: .6rem; padding: .6rem .9rem; }
.card b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line);
         vertical-align: top; }
td { white-space: pre-wrap; }
th { font-weight: 600; }
.figures th, .figures td { white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr));
         gap: 1rem; }
figure { margin: 0; max-width: 38rem; border: 1px solid var(--line); border-radius: .6rem;
         padding: .5rem; }
figcaption { font-weight: 600; text-align: center; }
figure svg { display: block; width: 100%; height: auto; }
.bar { background: var(--soft); border-radius: .3rem; height: .9rem; min-width: 5rem;
       margin-top: .35rem; }
.bar i { display: block; height: 100%; border-radius: .3rem; background: var(--good); }
.right { color: var(--good); } .wrong { color: var(--bad); }
details { border: 1px solid var(--line); border-radius: .6rem; padding: .4rem .9rem;
          margin: .6rem 0; }
summary { cursor: pointer; }
pre { overflow-x: auto; font-size: .85rem; white-space: pre-wrap; }
.texts { table-layout: fixed; }
.texts th.number { width: 5rem; } .texts th:empty { width: 2.5rem; }
@media (max-width: 42rem) {
  .texts, .texts tbody, .texts tr, .texts td { display: block; width: auto; }
  .texts tr:first-child { display: none; }
  .texts tr { border-bottom: 1px solid var(--line); padding: .5rem 0; }
  .texts td { border: 0; padding: .1rem 0; text-align: left; }
  .texts td::before { content: attr(data-name); display: block; font-size: .78rem; opacity: .7; }
}
"""
_INK = "#010203"  # stands for the page's own text colour, which a plot cannot know
_PLOT_STYLE: dict[Any, Any] = {
    **{f"{part}.color": _INK for part in ("text", "xtick", "ytick", "grid")},
    **{f"axes.{part}": _INK for part in ("edgecolor", "labelcolor")},
    **{f"axes.spines.{side}": False for side in ("top", "right")},
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.prop_cycle": "cycler('color', ['#3b8ad8', '#e8772e', '#2a9d5c', '#b065c9'])",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "svg.fonttype": "path",  # glyphs as shapes: no font is needed to see them
}
_MARKS = {True: "<b class=right>✓</b>", False: "<b class=wrong>✗</b>"}
_MANY = 100  # points: from here on those of training are smoothed, and of validation a line
_MAX_POINTS = 400
_MAX_SAMPLES = 40


@dataclass
class StageReport:
    """One stage as the report shows it; `metrics` are the lines of metrics.jsonl."""

    name: str
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    recipe: str

    @classmethod
    def read(cls, name: str, run: Path) -> "StageReport":
        """From a finished run directory."""
        lines = (run / "metrics.jsonl").read_text("utf-8").split("\n")
        return cls(
            name,
            json.loads((run / "summary.json").read_text("utf-8")),
            [json.loads(line) for line in lines if line],
            (run / "recipe.toml").read_text("utf-8"),
        )


def write_report(
    path: Path,
    *,
    title: str,
    lead: str,
    cards: Mapping[str, str],
    stages: Sequence[StageReport],
    eight: Sequence[Mapping[str, Any]],
    identity: Sequence[Mapping[str, Any]],
    by_subject: Mapping[str, tuple[int, int]],
    wrong: Sequence[Mapping[str, str]],
) -> None:
    """Write the page.

    `eight`: question, before_training, after_pretraining, after_fine_tuning, after_preferences,
    correct; `identity`: question, before, after, right;
    `by_subject`: (right, asked) of the quiz; `wrong`: question, answer, expected.
    """
    with_experts = [stage for stage in stages if _lines(stage.metrics, "expert_load/")]
    preferring = [stage for stage in stages if _lines(stage.metrics, "rewards/")]
    others = [stage for stage in stages if stage not in preferring]
    sections = [
        (
            "The eight questions",
            "The same questions at four moments. Before training the model writes noise; after "
            "pretraining it knows words but seldom the answer; after fine-tuning it should answer "
            "in one whole sentence, and learning preferences should keep it so. ✓ marks a last "
            "answer that is right and fluent.",
            _eight(eight),
        ),
        (
            "Stages",
            "Each stage starts from the model that the one before has left, at its last step; the "
            "best step is that of the best validation. Loss and bits per byte are those on "
            "held-out data at the end. Fine-tuning counts the answers alone, so "
            "its figures say nothing when put beside those of pretraining.",
            _stage_table(stages),
        ),
        (
            "Loss",
            "How surprised the model is by the next token, in nats: 0 would mean never. Good is a "
            "curve that falls fast, then slowly, with validation (text that is not trained on) "
            "close to train. If validation rises while train falls, the model learns by heart. "
            "Where general data has a line, its rise shows how much of that is being forgotten.",
            _plots(others, "loss", "nats per token"),
        ),
        (
            "Bits per byte",
            "How many bits the model needs for each byte of text: the loss again, but in a unit "
            "that does not depend on the tokenizer. Lower is better. The dashed line is a model "
            "that knows only how often each token occurs; good is far below it.",
            _plots(others, "bits_per_byte", "bits per byte", from_zero=True),
        ),
        (
            "Preferences",
            "Learning which of two answers is better. The loss begins at 0.693, the logarithm of "
            "2 (with ipo elsewhere), and should fall. The reward of an answer says how much "
            "likelier than at the start it is now: good is a reward of the chosen answers above "
            "that of the rejected ones. The accuracy is the share of pairs in which that is so. "
            "Log-probabilities are nats an answer: those of the rejected ones should fall; where "
            "those of the chosen ones fall far too, the model forgets how to talk.",
            _preferences(preferring),
        ),
        (
            "Learning rate",
            "How big a step each update of the weights may take. Good is a short rise, so that "
            "the start is calm, and a fall at the end, so that the model settles.",
            _plots(stages, "lr/", "learning rate", from_zero=True),
        ),
        (
            "Tokens per second",
            "How much text is read each second. Good is a flat line; a deep dip means that the "
            "machine was busy with something else.",
            _plots(stages, "tokens_per_second", "tokens per second", from_zero=True),
        ),
        (
            "Expert load",
            "The share of all choices of the router that falls on each expert, and the most and "
            "least that any expert of any layer gets. Good is every line near the even share; one "
            "at zero is an expert that learns nothing.",
            _plots(with_experts, "expert_load/", "share", from_zero=True),
        ),
        (
            "Dropped tokens",
            "Choices of the router that no expert has computed. Good is zero all along: tokens are "
            "sorted by expert, so that none has to be left out when many want the same one.",
            _plots(with_experts, "dropped_tokens", "choices"),
        ),
        (
            "Router entropy",
            "How undecided the router is, in nats a token: the logarithm of the number of experts "
            "means that it does not care, 0 that it always sees one expert alone. Good is a slow "
            "fall while the load stays even.",
            _plots(with_experts, "router_entropy", "nats per token", from_zero=True),
        ),
        (
            "Quiz by subject",
            "Questions in words that were never trained on, the weakest subject first. Good is a "
            "long bar everywhere; a short bar shows what the model has not understood.",
            _subjects(by_subject) + _wrong(wrong),
        ),
        (
            "A name of its own",
            "Asked who it is, in words never trained on, without and with the adapter that LoRA "
            "trained beside the model. ✓ marks an answer that says the name or the author that "
            "was asked for.",
            _identity(identity),
        ),
        (
            "What the model wrote on the way",
            "The same prompts continued at each evaluation. Good is text that grows from "
            "repeated words into sentences, and from sentences into true ones.",
            "".join(map(_samples, stages)),
        ),
        (
            "Recipes",
            "Every setting of each stage. Given such a file, minimind train runs the stage again.",
            "".join(_folded(s.name, f"<pre>{_text(s.recipe)}</pre>") for s in stages),
        ),
    ]
    figures = "".join(
        f"<div class=card>{_text(name)}<b>{_text(value)}</b></div>" for name, value in cards.items()
    )
    body = "\n".join(
        f"<h2>{name}</h2><p class=faint>{_text(explanation)}</p>{content}"
        for name, explanation, content in sections
        if content
    )
    page = (
        '<!doctype html><html lang="zh-Hans"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style>"
        f"<h1>{_text(title)}</h1><p class=faint>{_text(lead)}</p><div class=cards>{figures}</div>"
        f"{body}</html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _text(value: object) -> str:
    """Text that stays text in a page; control characters, which HTML forbids, as �."""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", str(value)))


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>{content}</details>"


def _table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: Collection[int] = (),
    kind: str = "figures",
) -> str:
    """A table whose cells are HTML; `numbers` are the columns set right.

    Of kind "texts" its columns are equally wide, and on a phone each cell has a line of its own.
    Without rows there is none.
    """
    marks = [" class=number" * (i in numbers) for i in range(len(head))]
    names = [_text(name) for name in head]
    lines = ["".join(f"<th{m}>{n}</th>" for m, n in zip(marks, names, strict=True))]
    lines += [
        "".join(
            f'<td{m} data-name="{n}">{c}</td>' for m, n, c in zip(marks, names, row, strict=True)
        )
        for row in rows
    ]
    if len(lines) == 1:
        return ""
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class=scroll><table class={kind}>{body}</table></div>"


def _eight(rows: Sequence[Mapping[str, Any]]) -> str:
    moments = {
        "before_training": "before training",
        "after_pretraining": "after pretraining",
        "after_fine_tuning": "after fine-tuning",
        "after_preferences": "after preferences",
    }
    return _table(
        ["question", *moments.values(), ""],
        (
            [*(_text(row[key]) for key in ("question", *moments)), _MARKS[row["correct"]]]
            for row in rows
        ),
        kind="texts",
    )


def _identity(rows: Sequence[Mapping[str, Any]]) -> str:
    return _table(
        ["question", "without the adapter", "with it", ""],
        (
            [*(_text(row[key]) for key in ("question", "before", "after")), _MARKS[row["right"]]]
            for row in rows
        ),
        kind="texts",
    )


def _stage_table(stages: Sequence[StageReport]) -> str:
    def cell(stage: StageReport, key: str, form: str) -> str:
        value = stage.summary.get(key)
        return "–" if value is None else format(value, form)

    columns = [
        ("parameters", "parameters", ",d"),
        ("steps", "steps", ",d"),
        ("best step", "best_step", ",d"),
        ("tokens", "tokens", ",d"),
        ("seconds", "seconds", ",.0f"),
        ("tokens/s", "tokens_per_second", ",.0f"),
        ("loss", "loss", ".3f"),
        ("bits/byte", "bits_per_byte", ".3f"),
        ("unigram bits/byte", "unigram_bits_per_byte", ".3f"),
    ]
    return _table(
        ["stage", *(title for title, _, _ in columns)],
        ([_text(s.name), *(cell(s, key, form) for _, key, form in columns)] for s in stages),
        numbers=range(1, len(columns) + 1),
    )


def _plots(stages: Sequence[StageReport], key: str, label: str, *, from_zero: bool = False) -> str:
    """A plot a stage; a `key` that ends in a slash means all that begins so, in training."""
    return _grid((stage.name, _plot(stage, key, label, from_zero)) for stage in stages)


def _grid(plots: Iterable[tuple[str, str]]) -> str:
    """Drawings side by side, each below its title; nothing if there are none."""
    figures = "".join(
        f"<figure><figcaption>{_text(title)}</figcaption>{drawing}</figure>"
        for title, drawing in plots
    )
    return f"<div class=plots>{figures}</div>" if figures else ""


def _preferences(stages: Sequence[StageReport]) -> str:
    """What is measured of pairs alone."""
    figures = {
        "loss": "loss per pair",
        "rewards/": "reward",
        "accuracy": "accuracy",
        "logps/": "log-probability",
    }
    return _grid(
        (f"{stage.name}: {label}", _plot(stage, key, label, from_zero=False))
        for stage in stages
        for key, label in figures.items()
    )


def _plot(stage: StageReport, key: str, label: str, from_zero: bool) -> str:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    lines = _lines(stage.metrics, key)
    unigram = stage.summary.get("unigram_bits_per_byte") if key == "bits_per_byte" else None
    if not lines:
        return "<p class=faint>Nothing was measured.</p>"
    with matplotlib.rc_context(_PLOT_STYLE | {"svg.hashsalt": f"{key} {stage.name}"}):
        figure = Figure(figsize=(4.4, 3), layout="constrained")
        axes = figure.subplots()
        for name, points in lines.items():
            steps, values = [step for step, _ in points], [value for _, value in points]
            many = len(points) >= _MANY
            dots = "o" if len(points) == 1 or (name == "validation" and not many) else ""
            if many and name == "train":
                axes.plot(steps, values, lw=0.8, alpha=0.35, color="C0")
                values = _smoothed(values)
            axes.plot(steps, values, marker=dots, ms=3.5, lw=1.6, label=name)
        if unigram:
            axes.axhline(unigram, ls="--", lw=1.2, color=_INK, alpha=0.6, label="unigram")
        if from_zero:
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.15)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if max(value for points in lines.values() for _, value in points) >= 1000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(frameon=False, fontsize=9)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    drawing = buffer.getvalue()
    drawing = re.sub(r' xmlns(:xlink)?="[^"]*"', "", drawing[drawing.index("<svg") :])
    return drawing.replace(_INK, "currentColor")


def _lines(metrics: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each line of a plot, by its name in the legend."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in metrics:
        for name, value in line.items():
            many = key.endswith("/")
            general = name == f"general_{key}"
            begins = name.startswith(key) and line["kind"] == "train"
            wanted = general or (begins if many else name == key)
            if wanted and isinstance(value, int | float) and math.isfinite(value):
                legend = name.removeprefix(key) if many else line["kind"]
                legend = "general" if general else legend
                found.setdefault(legend, []).append((line["step"], value))
    # Training first, so that a kind has one colour in all plots.
    ordered = sorted(found.items(), key=lambda line: line[0] != "train")
    return {name: _thinned(points) for name, points in ordered}


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `_MAX_POINTS`, each the mean of as many neighbours: a long run has a small page."""
    size = -(-len(points) // _MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], fmean(value for _, value in group)) for group in groups]


def _smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours, as many before as after: the curve has no lag."""
    last, reach = len(values) - 1, len(values) // 40
    near = [min(reach, i, last - i) for i in range(len(values))]
    return [fmean(values[i - n : i + n + 1]) for i, n in enumerate(near)]


def _subjects(by_subject: Mapping[str, tuple[int, int]]) -> str:
    def row(name: str, right: int, asked: int) -> list[str]:
        share = right / asked
        bar = f"<div class=bar><i style='width:{share:.0%}'></i></div>"
        return [_text(name), bar, f"{right}/{asked}", f"{share:.0%}"]

    ordered = sorted(by_subject.items(), key=lambda item: item[1][0] / item[1][1])
    rows = (row(name, right, asked) for name, (right, asked) in ordered)
    return _table(["subject", "", "right", ""], rows, numbers=(2, 3))


def _wrong(wrong: Sequence[Mapping[str, str]]) -> str:
    head = ["question", "answer", "expected"]
    table = _table(head, ([_text(one[key]) for key in head] for one in wrong), kind="texts")
    return _folded(f"{len(wrong):,} wrong answers", table) if wrong else ""


def _samples(stage: StageReport) -> str:
    """A row an evaluation, the last always among them; a column a prompt."""
    by_step: dict[int, dict[str, str]] = {}
    for line in stage.metrics:
        if line["kind"] == "sample":
            by_step.setdefault(line["step"], {})[line["prompt"]] = line["text"]
    prompts = list(dict.fromkeys(prompt for texts in by_step.values() for prompt in texts))
    every = max(1, -(-len(by_step) // _MAX_SAMPLES))
    shown = list(by_step.items())[::-every][::-1]
    rows = ([f"{step:,}", *(_text(texts.get(p, "")) for p in prompts)] for step, texts in shown)
    table = _table(["step", *prompts], rows, numbers=(0,), kind="texts")
    return table and f"<h3>{_text(stage.name)}</h3>{table}"
