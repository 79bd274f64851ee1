"""`report.html` and `report.md`: one page about training runs, built from their directories."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind.errors import DataError
from minimind.reporting.curves import add_curves
from minimind.reporting.evaluation_tables import add_benchmarks, add_demo_answers, add_demo_quiz
from minimind.reporting.formatting import MISSING, format_metric, number_of
from minimind.reporting.page import Cell, Folded, Page, Problems, Table, Title
from minimind.reporting.render import write_page
from minimind.reporting.runs import Inputs, Metrics, Run, find_runs
from minimind.reporting.scaling import add_scaling

_MAX_SAMPLES = 40


@dataclass
class Report:
    """A page, its metrics as JSON, its inputs, and the problems with them.

    complete: every source had a run or results, even if some of them are damaged.
    """

    page: Page
    metrics: Metrics
    inputs: Inputs
    problems: list[str]
    complete: bool

    def write(self, path: Path) -> None:
        """Write HTML to `path` and Markdown next to it."""
        write_page(self.page, path)


def make_report(sources: Sequence[Path], *, price: float | None = None) -> Report:
    """Build a report on the runs and results in the sources. price: cost per hour of training.

    One chain of runs is shown stage by stage; several chains share their axes. Raises DataError
    if no source has a run or results.
    """
    inputs = find_runs(sources)
    if not inputs.chains and not inputs.benchmarks:
        raise DataError(
            f"{'; '.join(inputs.missing) or 'no sources'}. Give run directories (the --out of "
            "training commands), folders of them, or results of minimind eval"
        )
    title = " · ".join(source.resolve().name for source in sources[:4])
    title += f" and {len(sources) - 4} more" if len(sources) > 4 else ""
    compare = len(inputs.chains) > 1
    problems = [
        *inputs.missing,
        *inputs.failed,
        *(f"{run.name}: {problem}" for run in inputs.runs for problem in run.problems),
    ]
    metrics: Metrics = {
        "runs": {run.name: _run_metrics(run, price) for run in inputs.runs},
        "benchmarks": inputs.benchmarks,
        "problems": problems,
    }
    page = Page(f"minimind: {title}", _lead(inputs), _cards(inputs, price))
    page.add("Problems", _ABOUT["Problems"], Problems(problems))
    demos = [(_title_suffix(path, inputs), demo) for path, demo in inputs.demos.items()]
    for suffix, demo in demos:
        add_demo_answers(page, demo, suffix)
    name = "Runs" if compare else "Stages"
    page.add(name, _ABOUT[name], _run_table(inputs, price))
    if compare:
        metrics["fits"] = add_scaling(page, inputs.runs)
    add_curves(page, inputs.chains)
    add_benchmarks(page, inputs.benchmarks)
    for suffix, demo in demos:
        add_demo_quiz(page, demo, suffix)
    samples = [block for run in inputs.runs for block in _samples(run)]
    page.add("Samples during training", _ABOUT["Samples"], *samples)
    recipes = [Folded(run.name, run.recipe) for run in inputs.runs if run.recipe]
    page.add("Recipes", _ABOUT["Recipes"], *recipes)
    return Report(page, metrics, inputs, problems, complete=not inputs.missing)


_ABOUT = {
    "Problems": "Files that could not be read, and runs that are not finished. Everything else on "
    "this page is based on what could be read.",
    "Stages": "Each stage starts from the final model of the stage before. Loss and bits per byte "
    "are those on validation data at the end; the best step is the one with the lowest validation "
    "loss. Fine-tuning computes the loss on answers only, so its metrics cannot be compared with "
    "those of pretraining.",
    "Runs": "One row per run. Loss and bits per byte are those on validation data at the end. "
    "Runs are comparable only on the same data. With different tokenizers, compare bits per byte, "
    "not loss.",
    "Samples": "Continuations of the same prompts at each validation. In a good run they develop "
    "from repeated words to sentences, and then to correct statements.",
    "Recipes": "All settings of each stage. To repeat a stage, save its settings to a file and run "
    "minimind train FILE.",
}


def _run_metrics(run: Run, price: float | None) -> Metrics:
    metrics: Metrics = {"kind": run.kind, "finished": run.finished, **run.metrics}
    cost = _cost(number_of(run.metrics, "seconds"), price)
    return metrics if cost is None else metrics | {"cost": cost}


def _cost(seconds: float | None, price: float | None) -> float | None:
    return None if price is None or seconds is None else seconds / 3600 * price


@dataclass(frozen=True)
class _Column:
    title: str
    key: str
    spec: str


_COLUMNS = [
    _Column("parameters", "parameters", ",.0f"),
    _Column("steps", "steps", ",.0f"),
    _Column("best step", "best_step", ",.0f"),
    _Column("tokens", "tokens", ",.0f"),
    _Column("seconds", "seconds", ",.0f"),
    _Column("tokens/s", "tokens_per_second", ",.0f"),
    _Column("loss", "loss", ".3f"),
    _Column("bits/byte", "bits_per_byte", ".3f"),
    _Column("unigram", "unigram_bits_per_byte", ".3f"),
]


def _run_table(inputs: Inputs, price: float | None) -> Table:
    """Return a table with a row per run, without columns that no run has."""

    def cells(run: Run) -> dict[str, str]:
        row = {
            column.title: format_metric(run.metrics, column.key, column.spec) for column in _COLUMNS
        }
        peak = number_of(run.metrics, "peak_memory_bytes")
        row["peak memory"] = MISSING if peak is None else f"{peak / (1 << 20):,.0f} MB"
        cost = _cost(number_of(run.metrics, "seconds"), price)
        row["cost"] = MISSING if cost is None else f"{cost:,.2f}"
        return row

    rows = [cells(run) for run in inputs.runs]
    titles = [
        title for title in (rows[0] if rows else ()) if any(r[title] != MISSING for r in rows)
    ]
    table: list[list[Cell]] = []
    for run, row in zip(inputs.runs, rows, strict=True):
        name = run.name if run.finished else f"{run.name} (not finished)"
        table.append([name, *(row[title] for title in titles)])
    head = ["run" if len(inputs.chains) > 1 else "stage", *titles]
    return Table(head, table, range(1, len(head)))


def _lead(inputs: Inputs) -> str:
    if len(inputs.chains) != 1:
        return f"{len(inputs.chains)} runs." if inputs.chains else "Benchmark results."
    metrics = inputs.chains[0][0].metrics
    parameters = number_of(metrics, "parameters")
    model = f"A GPT of {parameters:,.0f} parameters" if parameters else "A GPT"
    device, minutes = metrics.get("device", MISSING), _total_seconds(inputs) / 60
    return f"{model}, trained on {device} in {minutes:.1f} minutes."


def _total_seconds(inputs: Inputs) -> float:
    return sum(number_of(run.metrics, "seconds") or 0.0 for run in inputs.runs)


def _title_suffix(demo: Path, inputs: Inputs) -> str:
    """Return ": NAME" for one of several demos or roads, and nothing for a single one."""
    if len(inputs.demos) == 1:
        return ""
    is_unique = sum(path.name == demo.name for path in inputs.demos) == 1
    return f": {demo.name if is_unique else demo}"


def _cards(inputs: Inputs, price: float | None) -> dict[str, str]:
    """Return the most important metrics."""
    cards: dict[str, str] = {}
    seconds = _total_seconds(inputs)
    if inputs.chains:
        cards["training"] = f"{seconds:,.0f} s"
        tokens = sum(number_of(run.metrics, "tokens") or 0 for run in inputs.runs)
        cards["tokens"] = f"{tokens / 1e6:,.1f} M" if tokens >= 1e5 else f"{tokens:,.0f}"
    if price is not None:
        cards["cost"] = f"{seconds / 3600 * price:,.2f}"
    demos = list(inputs.demos.values())
    demo: dict[str, Any] = demos[0] if len(demos) == 1 else {}
    quiz = demo.get("quiz", {})
    if quiz.get("questions"):
        cards["quiz"] = f"{quiz['correct'] / quiz['questions']:.1%}"
    if scored := [row["correct"] for row in demo.get("questions", []) if "correct" in row]:
        cards["questions"] = f"{sum(scored)} of {len(scored)} correct"
    pretrained = [run for run in inputs.runs if run.kind == "pretrain"]
    bits = [number_of(run.metrics, "bits_per_byte") for run in pretrained]
    known = [value for value in bits if value is not None]
    if known:
        cards["bits per byte" if len(known) == 1 else "best bits per byte"] = f"{min(known):.3f}"
    if len(pretrained) == 1:
        unigram = number_of(pretrained[0].metrics, "unigram_bits_per_byte")
        cards |= {} if unigram is None else {"unigram": f"{unigram:.3f}"}
    if "accuracy" in demo.get("preferences", {}):
        cards["preference accuracy"] = f"{demo['preferences']['accuracy']:.1%}"
    identity = demo.get("identity", {})
    if identity.get("questions"):
        cards["knows its name"] = f"{identity['correct'] / identity['questions']:.0%}"
    return cards


def _samples(run: Run) -> list[Title | Table]:
    """Return a table with a row per validation and a column per prompt.

    Of many validations, evenly spaced ones are shown, including the last.
    """
    by_step: dict[int, dict[str, str]] = {}
    for line in run.history:
        if line["kind"] == "sample":
            texts = by_step.setdefault(line["step"], {})
            texts[str(line.get("prompt", ""))] = str(line.get("text", ""))
    if not by_step:
        return []
    prompts = list(dict.fromkeys(prompt for texts in by_step.values() for prompt in texts))
    stride = max(1, -(-len(by_step) // _MAX_SAMPLES))
    selected = list(by_step.items())[::-stride][::-1]
    rows = [
        [f"{step:,}", *(texts.get(prompt, "") for prompt in prompts)] for step, texts in selected
    ]
    return [Title(run.name), Table(["step", *prompts], rows, (0,), "texts")]
