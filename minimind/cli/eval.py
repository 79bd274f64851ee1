"""`minimind eval MODEL… --task TASK…`: how good models are, in figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from minimind.cli import console
from minimind.cli.options import Adapter, Context, Device
from minimind.errors import MinimindError, UsageError

if TYPE_CHECKING:
    from minimind.evaluation.contamination import Contamination
    from minimind.evaluation.tasks import Task

_HARNESS = "lm-eval:"

Metrics = dict[str, Any]


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL", help="Model or run directories; URL or URL#NAME of a service."
        ),
    ],
    task: Annotated[
        list[str],
        typer.Option(
            metavar="TASK",
            help="bpb, ceval, cmmlu, mmlu, c3, choice:FILE.csv, gsm8k, cmath, quiz, "
            "degeneration, or lm-eval:NAME. NAME:PATH where its data is somewhere of its own. "
            "Give it again for more.",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR", help="Where the questions are; for bpb, the texts."),
    ] = None,
    style: Annotated[
        Literal["chat", "letter", "answer"],
        typer.Option(
            help="Multiple choice: the letter after the chat prompt, the letter after solved "
            "examples (as lm-eval asks), or the likelihood of whole answers."
        ),
    ] = "chat",
    shots: Annotated[
        int, typer.Option(min=0, help="Solved examples before a question, but not in a chat.")
    ] = 5,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many questions of each task, from all over.")
    ] = None,
    contamination: Annotated[
        list[str] | None,
        typer.Option(metavar="DATA", help="Training data to look for the questions in."),
    ] = None,
    adapter: Adapter = None,
    context: Context = None,
    device: Device = "auto",
    out: Annotated[
        Path, typer.Option(help="Where results are kept; a stopped evaluation goes on from there.")
    ] = Path("out/eval"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Ask everything again.")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    """Examine models: bits per byte, exams, sums, and what of them was in the training data."""
    if adapter and len(models) > 1:
        raise UsageError("--adapter belongs to one model; give one MODEL")
    evaluation = _Evaluation(out, fresh, json, limit, device)
    tasks = evaluation.read_tasks(
        dict.fromkeys(task), dict(data=data or [], style=style, shots=shots, limit=limit)
    )
    found = evaluation.look_for(tasks, contamination or [])
    harness = [name for name in task if name.startswith(_HARNESS)]
    for path in dict.fromkeys(models) if tasks or harness else ():
        examined = evaluation.open(path, adapter, context)
        if examined is not None:
            for name in dict.fromkeys(task):
                if name.startswith(_HARNESS):
                    evaluation.run_harness(examined, name)
                elif name in tasks:
                    evaluation.run(examined, tasks[name], found.get(name))
    evaluation.show()
    if not evaluation.is_whole():
        raise typer.Exit(1)


@dataclass
class _Examined:
    """A model, where its results go, and what they depend on."""

    model: Any
    folder: Path
    identity: Mapping[str, Any]


@dataclass
class _Evaluation:
    """The figures so far, and what went wrong."""

    out: Path
    fresh: bool
    json: Path | None
    limit: int | None
    device: str
    metrics: dict[str, dict[str, Metrics]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def fail(self, what: str, error: Exception) -> None:
        """Say it at once, and again at the end; the rest goes on."""
        told = (
            str(error) if isinstance(error, MinimindError) else f"{type(error).__name__}: {error}"
        )
        told = told.removeprefix(f"{what}: ")  # models and files begin with their own name
        self.failures.append(f"{what}: {told}")
        console.say(f"{what} failed: {told}")

    def read_tasks(self, names: Mapping[str, None], how: dict[str, Any]) -> dict[str, "Task"]:
        """Their questions. A task whose name is wrong is a mistake; one without data a failure."""
        from minimind.evaluation.catalogue import make_task

        tasks: dict[str, Task] = {}
        for name in names:
            if name.startswith(_HARNESS):
                continue
            try:
                tasks[name] = make_task(name, **how)
            except UsageError:
                raise
            except MinimindError as error:
                self.fail(name, error)
        return tasks

    def look_for(
        self, tasks: Mapping[str, "Task"], data: Sequence[str]
    ) -> dict[str, "Contamination"]:
        """Questions that stand in the training data."""
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
                    "looking for the questions in the data", total=files_size(data), note=""
                )
                found = find_contamination(texts, data, partial(bar.advance, reading))
        except MinimindError as error:
            self.fail("--contamination", error)
            return {}
        return {name: found.part(f"{name}\0") for name, task in tasks.items() if task.texts()}

    def open(self, path: str, adapter: Path | None, context: int | None) -> _Examined | None:
        """A model; None when it is none, which is told."""
        from minimind.cli.models import open_model
        from minimind.evaluation.runner import file_name

        try:
            model = open_model(
                path, self.device, adapter=adapter, context=context, taken=self.metrics
            )
            identity = model.identity()
        except (MinimindError, OSError) as error:
            self.fail(path, error)
            return None
        self.metrics[model.name] = {}
        return _Examined(model, self.out / file_name(model.name), identity)

    def run(self, examined: _Examined, task: "Task", contamination: "Contamination | None") -> None:
        """One task, one model."""
        from minimind.cli.models import report_dropped
        from minimind.evaluation.runner import evaluate

        reporter = console.RichReporter()
        title = f"{examined.model.name}: {task.name}"
        reporter.start(title, len(task), unit=task.unit)
        try:
            self._keep(
                examined,
                evaluate(
                    task,
                    examined.model,
                    examined.folder,
                    identity=examined.identity,
                    contamination=contamination,
                    fresh=self.fresh,
                    progress=reporter.progress,
                ),
            )
        except Exception as error:
            if isinstance(error, MemoryError):
                raise
            self.fail(title, error)
        finally:
            reporter.stop()
        report_dropped(examined.model)

    def run_harness(self, examined: _Examined, name: str) -> None:
        """A task of lm-eval."""
        from minimind.evaluation.harness import run_harness

        title = f"{examined.model.name}: {name}"
        console.say(title)
        try:
            directory = getattr(examined.model, "directory", None)
            if directory is None:
                raise UsageError("lm-eval is run on a model directory, not on a service")
            self._keep(
                examined,
                run_harness(
                    name.removeprefix(_HARNESS),
                    directory,
                    examined.folder,
                    identity=examined.identity,
                    adapter=examined.model.adapter,
                    device=self.device,
                    limit=self.limit,
                    fresh=self.fresh,
                ),
            )
        except Exception as error:
            self.fail(title, error)

    def _keep(self, examined: _Examined, metrics: Metrics) -> None:
        self.metrics[examined.model.name][metrics["task"]] = metrics
        for path in filter(None, (self.out / "summary.json", self.json)):
            console.write_json(path, {"models": self.metrics})

    def is_whole(self) -> bool:
        """Whether nothing failed, not a single question either."""
        return not (self.failures or any(one.get("failed") for one in self._all_figures()))

    def _all_figures(self) -> list[Metrics]:
        return [one for tasks in self.metrics.values() for one in tasks.values()]

    def show(self) -> None:
        """The tables, and what failed."""
        metrics = self._all_figures()
        if metrics:
            columns = ["model", "task", "score", "95 %", "chance", "correct / questions", "failed"]
            rows = [_row(one) for one in metrics]
            if any("fluent" in one for one in metrics):
                columns.append("fluent")
                for row, one in zip(rows, metrics, strict=True):
                    row.append(f"{one['fluent']:,}" if "fluent" in one else None)
            console.show(console.table("Results", columns, rows, numbers=len(columns) - 2))
        self._show_contamination([one for one in metrics if "contamination" in one])
        for part, title in (("by_group", "by group"), ("by_source", "by source")):
            for task in dict.fromkeys(one["task"] for one in metrics if part in one):
                self._show_parts(task, part, title)
        for one in metrics:
            _tell_faults(one)
        if metrics:
            console.say(f"All figures, and each answer: {self.out}")
            for failure in self.failures:  # again, where it is not lost above the tables
                console.say(f"failed: {failure}")

    def _show_parts(self, task: str, part: str, title: str) -> None:
        """A task's parts, a column a model."""
        models = {
            name: tasks[task][part]
            for name, tasks in self.metrics.items()
            if len(tasks.get(task, {}).get(part, ())) > 1
        }
        if not models:
            return
        names = dict.fromkeys(name for parts in models.values() for name in parts)
        rows = (
            [name, *(_part(parts.get(name, {})) for parts in models.values())] for name in names
        )
        console.show(
            console.table(f"{task}, {title}", [title[3:], *models], rows, numbers=len(models))
        )

    def _show_contamination(self, metrics: Sequence[Metrics]) -> None:
        if not metrics:
            return
        rows = [
            (
                one["model"],
                one["task"],
                one["contamination"]["found"],
                one["contamination"]["too_short"],
                _score(one),
                _score(one["contamination"]["without"]),
            )
            for one in metrics
        ]
        columns = ["model", "task", "in the data", "too short to tell", "score", "without them"]
        console.show(console.table("Questions in the training data", columns, rows, numbers=4))


def _row(one: Metrics) -> list[object]:
    low, high = one.get("interval") or (None, None)
    asked = one.get("questions")
    if "bits_per_byte" in one:
        alone = low is None or one["documents"] == 1  # which says nothing of others
        spread = "–" if alone else f"{low:.4f} – {high:.4f}"
        told = console.count(one["documents"], "document", "documents")
        return [one["model"], one["task"], _score(one), spread, None, told, one["failed"]]
    spread = "–" if low is None else f"{low:.1%} – {high:.1%}"
    chance = f"{one['chance']:.1%}" if "chance" in one else None
    correct = None if "correct" not in one else f"{one['correct']:,} / {asked:,}"
    return [one["model"], one["task"], _score(one), spread, chance, correct, one.get("failed")]


def _score(one: Metrics) -> str:
    if one.get("bits_per_byte") is not None:
        return f"{one['bits_per_byte']:.4f} bits/byte"
    if one.get("accuracy") is not None:
        kind = " by keywords" if "fluent" in one else ""
        return f"{one['accuracy']:.2%}{kind}"
    return ", ".join(
        f"{name} {console.format_number(v)}" for name, v in one.get("metrics", {}).items()
    )


def _part(one: Metrics) -> str:
    """A score with what it rests on."""
    if one.get("accuracy") is None:
        return _score(one)
    low, high = one["interval"]
    told = (
        f"{one['accuracy']:.1%} ({low:.0%} – {high:.0%}), {one['correct']:,} / {one['questions']:,}"
    )
    return told + (f", chance {one['chance']:.0%}" if "chance" in one else "")


def _tell_faults(one: Metrics) -> None:
    title = f"{one['model']}: {one['task']}"
    if one.get("failed"):
        first = next(iter(one["errors"].items()))
        console.say(f"{title}: {one['failed']:,} failed, the first: {first[0]}: {first[1]}")
    if one.get("unreadable"):
        console.say(
            f"{title}: "
            + console.count(
                one["unreadable"], "line is no question or text", "lines are no questions or texts"
            )
            + f", the first: {one['first_unreadable']}"
        )
    if one.get("cut"):
        console.say(
            f"{title}: asked without its beginning, for that is more than the model reads: "
            + console.count(one["cut"], "question", "questions")
        )
    wanted, fewest = one.get("settings", {}).get("shots", 0), one.get("fewest_shots")
    if wanted and fewest is not None and fewest < wanted:
        had = console.count(fewest, "example", "examples")
        console.say(
            f"{title}: some questions had {had} before them, not {wanted}: there are no more, or "
            "no more fit into the context"
        )
