"""`report.html`: one self-contained page that shows what a run did."""

import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #2a9d5c; --bad: #c8553d; }
body { font: 16px/1.6 system-ui, "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif;
       max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { margin-top: 2.2rem; font-size: 1.25rem; }
p.lead { color: #777; margin-top: 0; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line);
         vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
figure { margin: 1rem 0; background: #fff; border-radius: .5rem; padding: .5rem; }
figure svg { width: 100%; height: auto; }
.bar { background: var(--soft); border-radius: .3rem; height: .9rem; min-width: 8rem; }
.bar i { display: block; height: 100%; border-radius: .3rem; background: var(--good); }
.right { color: var(--good); } .wrong { color: var(--bad); }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.card { border: 1px solid var(--line); border-radius: .6rem; padding: .6rem 1rem; }
.card b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
pre { background: var(--soft); padding: .8rem; border-radius: .5rem; overflow-x: auto;
      font-size: .85rem; white-space: pre-wrap; }
"""


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
    by_subject: Mapping[str, tuple[int, int]],
    wrong: Sequence[Mapping[str, str]],
) -> None:
    """Write the page.

    `eight`: question, before_training, after_pretraining, after_fine_tuning, correct;
    `by_subject`: (right, asked) of the quiz; `wrong`: question, answer, expected.
    """
    parts = [
        f"<h1>{_text(title)}</h1><p class=lead>{_text(lead)}</p>",
        "<div class=cards>"
        + "".join(f"<div class=card>{_text(k)}<b>{_text(v)}</b></div>" for k, v in cards.items())
        + "</div>",
        "<h2>The eight questions</h2>" + _eight(eight),
        "<h2>Stages</h2>" + _stage_table(stages),
        "<h2>Loss</h2>" + _figure(stages, "loss", "nats a token", smooth=True),
        "<h2>Bits per byte on held-out data</h2>" + _figure(stages, "bits_per_byte", "bits"),
        "<h2>Learning rate</h2>" + _figure(stages, "lr/", "learning rate", log=True),
        "<h2>Tokens per second</h2>" + _figure(stages, "tokens_per_second", "tokens/s"),
        "<h2>Quiz by subject</h2>" + _subjects(by_subject),
        f"<h2>Quiz answers that were wrong ({len(wrong)})</h2>"
        + _table(
            ["question", "answer", "expected"],
            ([_text(w["question"]), _text(w["answer"]), _text(w["expected"])] for w in wrong),
        ),
        "<h2>What the model wrote on the way</h2>" + _samples(stages),
        "<h2>Recipes</h2>"
        + "".join(f"<h3>{_text(s.name)}</h3><pre>{_text(s.recipe)}</pre>" for s in stages),
    ]
    page = (
        '<!doctype html><html lang="zh"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style>" + "\n".join(parts) + "</html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _text(value: object) -> str:
    return html.escape(str(value)).replace("\ufffd", "�")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """A table whose cells are HTML already; the last `numbers` columns are aligned right."""
    first = len(head) - numbers
    marks = [" class=number" if i >= first else "" for i in range(len(head))]
    lines = ["".join(f"<th{m}>{_text(h)}</th>" for m, h in zip(marks, head, strict=True))]
    lines += ["".join(f"<td{m}>{c}</td>" for m, c in zip(marks, row, strict=True)) for row in rows]
    return "<div class=scroll><table>" + "".join(f"<tr>{x}</tr>" for x in lines) + "</table></div>"


def _eight(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["question", "before training", "after pretraining", "after fine-tuning", ""]
    return _table(
        head,
        (
            [
                _text(row["question"]),
                _text(row["before_training"]),
                _text(row["after_pretraining"]),
                _text(row["after_fine_tuning"]),
                "<b class=right>✓</b>" if row["correct"] else "<b class=wrong>✗</b>",
            ]
            for row in rows
        ),
    )


def _stage_table(stages: Sequence[StageReport]) -> str:
    def cell(stage: StageReport, key: str, form: str) -> str:
        value = stage.summary.get(key)
        return "–" if value is None else format(value, form)

    columns = [
        ("parameters", "parameters", ",d"),
        ("steps", "steps", ",d"),
        ("tokens", "tokens", ",d"),
        ("seconds", "seconds", ",.0f"),
        ("tokens/s", "tokens_per_second", ",.0f"),
        ("loss", "loss", ".3f"),
        ("bits/byte", "bits_per_byte", ".3f"),
        ("unigram bits/byte", "unigram_bits_per_byte", ".3f"),
    ]
    rows = ([_text(s.name), *(cell(s, key, form) for _, key, form in columns)] for s in stages)
    return _table(["stage", *(title for title, _, _ in columns)], rows, numbers=len(columns))


def _figure(
    stages: Sequence[StageReport],
    key: str,
    label: str,
    *,
    log: bool = False,
    smooth: bool = False,
) -> str:
    """One plot, a panel a stage; `key` ending in a slash means every metric that begins so."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.8), layout="constrained")
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    for panel, stage in zip(panels, stages, strict=True):
        names = sorted({k for m in stage.metrics for k in m if k == key or k.startswith(key)})
        for name in (n for n in names if n == key or key.endswith("/")):
            for kind, style in (("train", "-"), ("validation", "o-")):
                points = [(m["step"], m[name]) for m in stage.metrics if _has(m, name, kind)]
                if points and not (key == "bits_per_byte" and kind == "train"):
                    steps, values = zip(*points, strict=True)
                    what = name.removeprefix("lr/") if key.endswith("/") else kind
                    faint = smooth and kind == "train" and len(values) > 40
                    panel.plot(steps, values, style, ms=3, lw=1, alpha=0.35 if faint else 1)
                    if faint:
                        color = panel.lines[-1].get_color()
                        panel.plot(steps, _smoothed(values), lw=1.6, color=color, label=what)
                    else:
                        panel.lines[-1].set_label(what)
        unigram = stage.summary.get("unigram_bits_per_byte")
        if key == "bits_per_byte" and unigram:
            panel.axhline(unigram, ls="--", lw=1, color="grey", label="unigram")
        panel.set_title(stage.name, fontsize=10)
        panel.set_xlabel("step", fontsize=9)
        panel.grid(alpha=0.25)
        panel.tick_params(labelsize=8)
        if log:
            panel.set_yscale("log")
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8, frameon=False)
    panels[0].set_ylabel(label, fontsize=9)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawing = buffer.getvalue()
    return f"<figure>{drawing[drawing.index('<svg') :]}</figure>"


def _has(metrics: Mapping[str, Any], name: str, kind: str) -> bool:
    return metrics.get("kind") == kind and metrics.get(name) is not None


def _smoothed(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average."""
    smooth = [values[0]]
    for value in values[1:]:
        smooth.append(keep * smooth[-1] + (1 - keep) * value)
    return smooth


def _subjects(by_subject: Mapping[str, tuple[int, int]]) -> str:
    def row(name: str, right: int, asked: int) -> list[str]:
        share = right / asked
        bar = f"<div class=bar><i style='width:{share:.0%}'></i></div>"
        return [_text(name), bar, f"{right}/{asked}", f"{share:.0%}"]

    ordered = sorted(by_subject.items(), key=lambda item: item[1][0] / item[1][1])
    return _table(["subject", "", "right", ""], (row(n, r, a) for n, (r, a) in ordered), numbers=2)


def _samples(stages: Sequence[StageReport]) -> str:
    rows = [
        [_text(s.name), f"{m['step']:,}", _text(m["prompt"]), _text(m["text"])]
        for s in stages
        for m in s.metrics
        if m["kind"] == "sample"
    ]
    return _table(["stage", "step", "prompt", "what the model wrote"], rows)
