"""`minimind compare MODEL…`: the answers of several models to the same questions."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind.cli import console
from minimind.cli.evaluation import Evaluation
from minimind.cli.options import AnswerSeed, AnswerTemperature, Context, Device, Json, MaxNewTokens
from minimind.cli.terminal import strip_controls
from minimind.environment import KEY_VARIABLE
from minimind.errors import MinimindError, ServiceError, same_command
from minimind.files import write_json

if TYPE_CHECKING:
    from minimind.evaluation.open_ended import OpenEndedTask
    from minimind.evaluation.remote import Service
    from minimind.evaluation.tasks import Result

_CONCURRENCY = 8  # the same for directories and services, so that their speeds compare
_MAX_VERDICT_TOKENS = 2048
_JUDGE_KEY = "MINIMIND_JUDGE_API_KEY"
_SHOWN_QUESTIONS = 8  # in the terminal
_EXCERPT = 160  # characters of an answer in the terminal


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Model or run directories, DIR+ADAPTER with a LoRA adapter; URL or URL#NAME of a "
            f"service, with its API key in {KEY_VARIABLE}.",
        ),
    ],
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Questions: text with one per line, or records as in JSONL. All user messages "
            "of a conversation are asked. Default: eight built-in questions.",
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Service whose model (URL or URL#NAME) scores the answers, with its API key in "
            f"{_JUDGE_KEY} or {KEY_VARIABLE}.",
        ),
    ] = None,
    temperature: AnswerTemperature = 0.0,
    seed: AnswerSeed = 0,
    max_new_tokens: MaxNewTokens = 256,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Use an evenly spaced subset of N questions or conversations."),
    ] = None,
    context: Context = None,
    device: Device = "auto",
    out: Annotated[
        Path, typer.Option(help="Folder of the results; an interrupted comparison is resumed.")
    ] = Path("out/compare"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard earlier results.")] = False,
    json: Json = None,
) -> None:
    """Compare the answers of models to the same questions.

    Shows answers and metrics and, with a judge, a ranking.
    """
    from minimind.evaluation.open_ended import OpenEndedTask, read_prompts
    from minimind.evaluation.tasks import GenerationConfig

    questions, invalid = read_prompts(prompts, limit)
    generation = GenerationConfig(max_new_tokens, temperature, seed, _CONCURRENCY)
    task = OpenEndedTask("answers", questions, generation, invalid)
    comparison = _Comparison(out, fresh, json, device, task)
    service = comparison.open_judge(judge) if judge else None
    for model in dict.fromkeys(models):
        comparison.answer(model, context)
    if service:
        comparison.judge(service)
    comparison.show()
    if comparison.failures or any(each["failed"] for each in comparison.metrics.values()):
        raise typer.Exit(1)


@dataclass
class _Comparison(Evaluation):
    """Results and metrics by model, the judge's verdicts, and the comparison built from them."""

    task: "OpenEndedTask"
    results: dict[str, dict[str, "Result"]] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    verdicts: dict[str, Any] = field(default_factory=dict)
    comparison: dict[str, Any] = field(default_factory=dict)

    def open_judge(self, url: str) -> "Service | None":
        """Connect to the judge; called first, so that a wrong URL fails before the long work."""
        from minimind.cli.models import open_service

        try:
            return open_service(url, _JUDGE_KEY)
        except MinimindError as error:
            self.fail(f"--judge {url}", error)
            return None

    def answer(self, name: str, context: int | None) -> None:
        """Generate one model's answers to the questions that it has not answered before."""
        from minimind.cli.models import is_service
        from minimind.evaluation.runner import read_results

        context = None if is_service(name) else context
        opened = self.open_model(name, taken=self.metrics, context=context)
        if opened is None:
            return
        model = opened.model.name
        self.run_task(opened, self.task, model)
        try:
            # Also after a failure: the answers before it count.
            header = self.task.settings() | dict(opened.identity)
            results = read_results(opened.folder / "answers.jsonl", header)
        except MinimindError:
            return  # run_task has reported it
        good = [result for result in results.values() if "error" not in result]
        if results:
            errors = (result["error"] for result in results.values() if "error" in result)
            self.results[model] = results
            self.metrics[model] = {
                **self.task.summary(good),
                "failed": len(self.task) - len(good),
                "first_error": next(errors, None),
                "identity": opened.identity,
            }
            self._write()

    def judge(self, service: "Service") -> None:
        """Request the judge's scores for all pairs of answers that it has not scored before."""
        from minimind.cli.models import report_dropped
        from minimind.evaluation.judge import judge, make_trials, verdicts
        from minimind.evaluation.runner import file_name

        answers = {
            model: {name: r["answer"] for name, r in results.items() if "error" not in r}
            for model, results in self.results.items()
        }
        trials = make_trials(list(self.task.prompts.values()), answers)
        identity = service.identity()
        file = file_name(f"{service.name} {identity['url']}")
        title = f"judge {service.name}"
        reporter = console.RichReporter()
        reporter.start(title, len(trials), unit="verdict")
        try:
            judged = judge(
                lambda messages: (
                    service.answer(messages, max_tokens=_MAX_VERDICT_TOKENS, temperature=0).text
                ),
                trials,
                self.out / f"judge-{file}.jsonl",
                identity=identity,
                fresh=self.fresh,
                progress=reporter.progress,
            )
        except MinimindError as error:
            self.fail(title, error)
            return
        finally:
            reporter.stop()
        report_dropped(service)
        metrics = {"name": service.name, **verdicts(trials, judged, list(answers))}
        if metrics["failed"]:
            failure = ServiceError(
                f"{metrics['failed']:,} of {len(trials):,} requests failed (the first: "
                f"{metrics['first_error']}); run {same_command()} again to repeat them"
            )
            self.fail(title, failure)
        self.verdicts = {"judge": metrics, "trials": trials, "judged": judged}
        self._write()

    def _write(self) -> None:
        from minimind.evaluation.comparison import build_comparison, write_comparison

        self.comparison = build_comparison(self.task, self.results, self.metrics, **self.verdicts)
        write_comparison(self.out, self.comparison)
        if self.json:
            write_json(self.json, self.comparison)

    def show(self) -> None:
        """Print the tables and the failures."""
        if self.comparison:
            self._show_tables()
        if self.task.invalid.total:
            lines = console.pluralize(self.task.invalid.total, "invalid line")
            console.say(
                strip_controls(f"{lines} in the questions, the first: {self.task.invalid.first}")
            )
        for name, metrics in self.metrics.items():
            if error := metrics["first_error"]:
                console.say(
                    strip_controls(f"{name}: {metrics['failed']:,} failed, the first: {error}")
                )
        if self.comparison:
            console.say(f"All answers: {self.out / 'compare.html'}, .md and .json")
        self.show_failures()

    def _show_tables(self) -> None:
        from minimind.evaluation.comparison import (
            RANKING_COLUMNS,
            category_rows,
            describe_judge,
            mark_turn,
            metric_rows,
            ranking_rows,
        )

        models = [strip_controls(model) for model in self.metrics]
        questions = self.comparison["questions"]
        rows = [
            [
                strip_controls(mark_turn(question)),
                *(_excerpt(question["answers"].get(model)) for model in self.metrics),
            ]
            for question in questions[:_SHOWN_QUESTIONS]
        ]
        more = len(questions) > _SHOWN_QUESTIONS
        title = f"The first {_SHOWN_QUESTIONS} answers" if more else "Answers"
        console.show(console.table(title, ["question", *models], rows))
        rows = metric_rows(self.comparison)
        console.show(console.table("Metrics", ["", *models], rows, numbers=len(models)))
        if rows := [[*map(strip_controls, row)] for row in category_rows(self.comparison)]:
            head = ["category", "questions", *models]
            console.show(console.table("By category", head, rows, numbers=len(head) - 1))
        if self.comparison["judge"]:
            rows = [[*map(strip_controls, row)] for row in ranking_rows(self.comparison)]
            console.show(console.table("Ranking", list(RANKING_COLUMNS), rows, numbers=3))
            console.say(strip_controls(describe_judge(self.comparison["judge"])))


def _excerpt(answer: dict[str, Any] | None) -> str:
    from minimind.evaluation.comparison import describe_answer

    if answer is None:
        return "–"
    if "error" in answer:
        return strip_controls(f"failed: {answer['error']}")
    text = strip_controls(answer["answer"])
    ellipsis = "…" if len(text) > _EXCERPT else ""
    return f"{text[:_EXCERPT]}{ellipsis}\n({', '.join(describe_answer(answer))})"
