"""`minimind eval MODEL… --task TASK…`: benchmarks, bits per byte, contamination."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from minimind.cli import console
from minimind.cli.downloads import Yes, ensure_downloaded
from minimind.cli.evaluation import Evaluation, Metrics, OpenedModel
from minimind.cli.options import Adapter, Context, Device, Json
from minimind.errors import MinimindError, UsageError
from minimind.files import write_json

if TYPE_CHECKING:
    from minimind.evaluation.contamination import Contamination
    from minimind.evaluation.tasks import Task

HARNESS = "lm-eval:"


_Tasks = Annotated[
    list[str],
    typer.Option(
        metavar="TASK",
        help="bpb, ceval, cmmlu, mmlu, c3, choice:FILE.csv, gsm8k, cmath, quiz, "
        "degeneration, or lm-eval:NAME; NAME:PATH reads the data from PATH. Repeatable.",
    ),
]


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL", help="Model or run directories; URL or URL#NAME of a service."
        ),
    ],
    task: _Tasks,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR",
            help="Folder with the benchmarks, default: downloaded ones; for bpb, the texts.",
        ),
    ] = None,
    style: Annotated[
        Literal["chat", "letter", "answer"],
        typer.Option(
            help="Multiple-choice prompts: the option's letter after a chat prompt, the letter "
            "after solved examples (as in lm-eval), or the likelihood of the full answer."
        ),
    ] = "chat",
    shots: Annotated[
        int, typer.Option(min=0, help="Few-shot examples per question; none with --style chat.")
    ] = 5,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Evaluate an evenly spaced subset of N questions per task."),
    ] = None,
    contamination: Annotated[
        list[str] | None,
        typer.Option(metavar="DATA", help="Training data to search for the questions."),
    ] = None,
    adapter: Adapter = None,
    context: Context = None,
    device: Device = "auto",
    out: Annotated[
        Path, typer.Option(help="Folder of the results; an interrupted evaluation is resumed.")
    ] = Path("out/eval"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard earlier results.")] = False,
    yes: Yes = False,
    json: Json = None,
) -> None:
    """Evaluate models: bits per byte, benchmarks, contamination."""
    names = list(dict.fromkeys(task))
    _check_options(names, models, data or [], adapter, context)
    ensure_downloaded(task_datasets(names, data or [], contamination or []), yes)
    evaluation = _Benchmarks(out, fresh, json, device, limit)
    tasks = evaluation.read_tasks(
        [name for name in names if not name.startswith(HARNESS)],
        dict(data=data or [], style=style, shots=shots, limit=limit),
    )
    contaminated = evaluation.find_contamination(tasks, contamination or [])
    runnable = [name for name in names if name in tasks or name.startswith(HARNESS)]
    for model in dict.fromkeys(models) if runnable else ():
        opened = evaluation.open_model(
            model, taken=evaluation.metrics, adapter=adapter, context=context
        )
        if opened is not None:
            evaluation.run_all(opened, runnable, tasks, contaminated)
    evaluation.show()
    if not evaluation.succeeded():
        raise typer.Exit(1)


def _check_options(
    tasks: Sequence[str],
    models: Sequence[str],
    data: Sequence[str],
    adapter: Path | None,
    context: int | None,
) -> None:
    """Raise UsageError for options that contradict each other."""
    from minimind.evaluation.catalogue import check_data

    if adapter and len(models) > 1:
        raise UsageError("--adapter applies to a single model; give one MODEL")
    if context is not None and (harness := [task for task in tasks if task.startswith(HARNESS)]):
        raise UsageError(
            f"--context does not apply to {harness[0]}: lm-eval uses the model's own context; "
            "evaluate this task in a separate command without --context"
        )
    check_data(tasks, data)


def task_datasets(
    tasks: Sequence[str], data: Sequence[str] = (), contamination: Sequence[str] = ()
) -> list[str]:
    """Return the paths and dataset names that an evaluation reads."""
    own = [task.partition(":") for task in tasks if not task.startswith(HARNESS)]
    packaged = ("quiz", "degeneration")  # their questions come with the package
    named = [path or name for name, _, path in own if path or (not data and name not in packaged)]
    return [*named, *data, *contamination]


@dataclass
class _Benchmarks(Evaluation):
    """Metrics by model and task."""

    limit: int | None
    metrics: dict[str, dict[str, Metrics]] = field(default_factory=dict)

    def read_tasks(self, names: Sequence[str], options: dict[str, Any]) -> dict[str, "Task"]:
        """Read the data of tasks. Reports missing data.

        Raises UsageError for a wrong name, and for two tasks whose results have the same file.
        """
        from minimind.evaluation.catalogue import make_task
        from minimind.evaluation.runner import file_name

        tasks: dict[str, Task] = {}
        files: dict[str, str] = {}
        for name in names:
            try:
                tasks[name] = make_task(name, **options)
            except UsageError:
                raise
            except MinimindError as error:
                self.fail(name, error)
                continue
            other = files.setdefault(file_name(tasks[name].name), name)
            if other != name:
                raise UsageError(
                    f"the results of --task {other} and --task {name} would have the same file "
                    "name; evaluate them in separate commands, each with its own --out"
                )
        return tasks

    def find_contamination(
        self, tasks: Mapping[str, "Task"], data: Sequence[str]
    ) -> dict[str, "Contamination"]:
        """Search the training data for questions of all tasks in one pass."""
        from minimind.evaluation.contamination import files_size, find_contamination

        texts = {
            f"{name}\0{key}": text
            for name, task in tasks.items()
            for key, text in task.texts().items()
        }
        if not data or not texts:
            return {}
        try:
            with console.make_progress("byte") as bar:
                reading = bar.add_task(
                    "searching the training data", total=files_size(data), note=""
                )
                found = find_contamination(texts, data, partial(bar.advance, reading))
        except MinimindError as error:
            self.fail("--contamination", error)
            return {}
        return {
            name: found.with_prefix(f"{name}\0") for name, task in tasks.items() if task.texts()
        }

    def run_all(
        self,
        opened: OpenedModel,
        names: Sequence[str],
        tasks: Mapping[str, "Task"],
        contaminated: Mapping[str, "Contamination"],
    ) -> None:
        """Run all tasks, and those of lm-eval, on one model."""
        self.metrics[opened.model.name] = {}
        for name in names:
            if name in tasks:
                self.run(opened, tasks[name], contaminated.get(name))
            else:
                self.run_harness(opened, name)

    def run(self, opened: OpenedModel, task: "Task", contamination: "Contamination | None") -> None:
        """Run one task on one model."""
        title = f"{opened.model.name}: {task.name}"
        metrics = self.run_task(opened, task, title, contamination)
        if metrics is not None:
            self._store(opened, metrics)

    def run_harness(self, opened: OpenedModel, name: str) -> None:
        """Run one task of lm-eval on one model."""
        from minimind.evaluation.harness import run_harness

        title = f"{opened.model.name}: {name}"
        console.say(title)
        try:
            directory = getattr(opened.model, "directory", None)
            if directory is None:
                raise UsageError("lm-eval needs a model directory; it cannot evaluate a service")
            metrics = run_harness(
                name.removeprefix(HARNESS),
                opened.model.name,
                directory,
                opened.folder,
                identity=opened.identity,
                adapter=opened.model.adapter,
                device=self.device,
                limit=self.limit,
                fresh=self.fresh,
            )
            self._store(opened, metrics)
        except Exception as error:
            self.fail(title, error)

    def _store(self, opened: OpenedModel, metrics: Metrics) -> None:
        self.metrics[opened.model.name][metrics["task"]] = metrics
        for path in filter(None, (self.out / "summary.json", self.json)):
            write_json(path, {"models": self.metrics})

    def succeeded(self) -> bool:
        """Return True if no task and no single question failed."""
        return not (self.failures or any(m.get("failed") for m in self._all_metrics()))

    def _all_metrics(self) -> list[Metrics]:
        return [metrics for tasks in self.metrics.values() for metrics in tasks.values()]

    def show(self) -> None:
        """Print the tables and the failures."""
        all_metrics = self._all_metrics()
        if all_metrics:
            self._show_results(all_metrics)
        self._show_contamination([m for m in all_metrics if "contamination" in m])
        for key, title in (("by_group", "by group"), ("by_source", "by source")):
            for task in dict.fromkeys(m["task"] for m in all_metrics if key in m):
                self._show_parts(task, key, title)
        for metrics in all_metrics:
            _report_problems(metrics)
        if all_metrics:
            console.say(f"All metrics and answers: {self.out}")
            self.show_failures()

    def _show_results(self, all_metrics: Sequence[Metrics]) -> None:
        columns = ["model", "task", "score", "95 %", "chance", "correct / questions", "failed"]
        rows = [_result_row(metrics) for metrics in all_metrics]
        if any("fluent" in metrics for metrics in all_metrics):
            columns.append("fluent")
            for row, metrics in zip(rows, all_metrics, strict=True):
                row.append(f"{metrics['fluent']:,}" if "fluent" in metrics else None)
        console.show(console.table("Results", columns, rows, numbers=len(columns) - 2))

    def _show_parts(self, task: str, key: str, title: str) -> None:
        """Show the parts of a task, with a column per model."""
        models = {
            name: tasks[task][key]
            for name, tasks in self.metrics.items()
            if len(tasks.get(task, {}).get(key, ())) > 1
        }
        if not models:
            return
        names = dict.fromkeys(name for parts in models.values() for name in parts)
        rows = (
            [name, *(_format_detailed_score(parts.get(name, {})) for parts in models.values())]
            for name in names
        )
        head = [title.removeprefix("by "), *models]
        console.show(console.table(f"{task}, {title}", head, rows, numbers=len(models)))

    def _show_contamination(self, contaminated: Sequence[Metrics]) -> None:
        if not contaminated:
            return
        rows = [
            (
                metrics["model"],
                metrics["task"],
                metrics["contamination"]["found"],
                metrics["contamination"]["too_short"],
                _format_score(metrics),
                _format_score(metrics["contamination"]["without"]),
            )
            for metrics in contaminated
        ]
        columns = ["model", "task", "found", "too short", "score", "score without found"]
        console.show(console.table("Questions in the training data", columns, rows, numbers=4))


def _result_row(metrics: Metrics) -> list[object]:
    low, high = metrics.get("interval") or (None, None)
    if "bits_per_byte" in metrics:
        # A single document has no interval.
        known = low is not None and metrics["documents"] > 1
        interval = f"{low:.4f} – {high:.4f}" if known else "–"
        chance, counts = None, console.pluralize(metrics["documents"], "document")
    else:
        interval = "–" if low is None else f"{low:.1%} – {high:.1%}"
        chance = f"{metrics['chance']:.1%}" if "chance" in metrics else None
        counts = None
        if "correct" in metrics:
            counts = f"{metrics['correct']:,} / {metrics['questions']:,}"
    failed = metrics.get("failed")
    return [
        metrics["model"],
        metrics["task"],
        _format_score(metrics),
        interval,
        chance,
        counts,
        failed,
    ]


def _format_score(metrics: Metrics) -> str:
    if metrics.get("bits_per_byte") is not None:
        return f"{metrics['bits_per_byte']:.4f} bits/byte"
    if metrics.get("accuracy") is not None:
        kind = " by keywords" if "fluent" in metrics else ""
        return f"{metrics['accuracy']:.2%}{kind}"
    values = metrics.get("metrics", {})
    return ", ".join(f"{name} {console.format_number(value)}" for name, value in values.items())


def _format_detailed_score(metrics: Metrics) -> str:
    """Return a score with its interval and counts."""
    if metrics.get("accuracy") is None:
        return _format_score(metrics)
    low, high = metrics["interval"]
    score = f"{metrics['accuracy']:.1%} ({low:.0%} – {high:.0%})"
    counts = f"{metrics['correct']:,} / {metrics['questions']:,}"
    chance = f", chance {metrics['chance']:.0%}" if "chance" in metrics else ""
    return f"{score}, {counts}{chance}"


def _report_problems(metrics: Metrics) -> None:
    title = f"{metrics['model']}: {metrics['task']}"
    if metrics.get("failed"):
        question, error = next(iter(metrics["errors"].items()))
        console.say(f"{title}: {metrics['failed']:,} failed, the first: {question}: {error}")
    if metrics.get("unreadable"):
        lines = console.pluralize(metrics["unreadable"], "invalid line")
        console.say(f"{title}: {lines}, the first: {metrics['first_unreadable']}")
    if metrics.get("cut"):
        questions = console.pluralize(metrics["cut"], "question")
        console.say(f"{title}: {questions} truncated at the start to fit into the context")
    requested, fewest = metrics.get("settings", {}).get("shots", 0), metrics.get("fewest_shots")
    if requested and fewest is not None and fewest < requested:
        examples = console.pluralize(fewest, "few-shot example")
        console.say(
            f"{title}: some questions had {examples} instead of {requested}, because there are no "
            "more, or no more fit into the context"
        )
