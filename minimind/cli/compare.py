"""`minimind compare MODEL…`: the same questions to several models, side by side."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind.cli import console
from minimind.cli.options import Context, Device, MaxNewTokens
from minimind.cli.terminal import strip_controls
from minimind.environment import KEY_VARIABLE
from minimind.errors import MinimindError, ServiceError

if TYPE_CHECKING:
    from minimind.evaluation.open_ended import OpenEndedTask
    from minimind.evaluation.remote import Service
    from minimind.evaluation.tasks import Result

_AT_ONCE = 8  # questions, of a directory as of a service, so that their speeds say the same
_VERDICT = 2048  # tokens
_JUDGE_KEY = "MINIMIND_JUDGE_API_KEY"
_SHOWN = 8  # questions in the terminal
_EXCERPT = 160  # characters of an answer there


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Model or run directories, DIR+ADAPTER with a LoRA adapter; URL or URL#NAME of a "
            f"service, whose key is in {KEY_VARIABLE}.",
        ),
    ],
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Questions: text with one a line, or records as in JSONL. Default: eight of ours.",
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Service whose model, URL or URL#NAME, scores the answers; its key is in "
            f"{_JUDGE_KEY}, else in {KEY_VARIABLE}.",
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            min=0, max=2, help="0 always takes the likeliest word; higher is more varied."
        ),
    ] = 0.0,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="The same seed gives the same answers.")
    ] = 0,
    max_new_tokens: MaxNewTokens = 256,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many questions, from all over.")
    ] = None,
    context: Context = None,
    device: Device = "auto",
    out: Annotated[
        Path, typer.Option(help="Where it is written; a stopped comparison goes on from there.")
    ] = Path("out/compare"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Ask everything again.")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    """Put the same questions to several models: answers, figures, and a judge's ranking."""
    from minimind.evaluation.open_ended import OpenEndedTask, read_prompts
    from minimind.evaluation.tasks import GenerationConfig

    questions, bad = read_prompts(prompts, limit)
    talk = OpenEndedTask(
        "answers", questions, GenerationConfig(max_new_tokens, temperature, seed, _AT_ONCE), bad
    )
    comparison = _Comparison(talk, out, fresh, json, device, context)
    service = comparison.open_judge(judge) if judge else None
    for place in dict.fromkeys(models):
        comparison.ask(place)
    if service:
        comparison.judge(service)
    comparison.show()
    if comparison.failures:
        raise typer.Exit(1)


@dataclass
class _Comparison:
    """What is known so far, and what went wrong."""

    talk: "OpenEndedTask"
    out: Path
    fresh: bool
    json: Path | None
    device: str
    context: int | None
    results: dict[str, dict[str, "Result"]] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    judgement: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    compared: dict[str, Any] = field(default_factory=dict)

    def fail(self, what: str, error: Exception) -> None:
        """Say it at once, and again at the end; the rest goes on."""
        from minimind.evaluation.tasks import told

        self.failures.append(f"{what}: {told(error)}")
        console.say(strip_controls(f"{what} failed: {told(error)}"))

    def open_judge(self, url: str) -> "Service | None":
        """Before anything is asked, so that a mistake is told at once."""
        from minimind.cli.models import open_service

        try:
            return open_service(url, _JUDGE_KEY)
        except MinimindError as error:
            self.fail(f"--judge {url}", error)
            return None

    def ask(self, place: str) -> None:
        """All questions to one model, but for those that it has answered."""
        from minimind.cli.models import is_service, open_model, report_dropped
        from minimind.evaluation.runner import evaluate, file_name, read_results

        try:
            context = None if is_service(place) else self.context
            model = open_model(place, self.device, context=context, taken=self.metrics)
            identity = model.identity()
        except (MinimindError, OSError) as error:
            self.fail(place, error)
            return
        folder = self.out / file_name(model.name)
        reporter = console.RichReporter()
        reporter.start(model.name, len(self.talk), unit=self.talk.unit)
        try:
            evaluate(
                self.talk,
                model,
                folder,
                identity=identity,
                fresh=self.fresh,
                progress=reporter.progress,
            )
        except MemoryError:
            raise
        except Exception as error:
            self.fail(model.name, error)
        finally:
            reporter.stop()
        report_dropped(model)
        try:
            header = self.talk.settings() | identity
            results = read_results(folder / "answers.jsonl", header)
        except MinimindError:
            return  # as was told above
        good = [result for result in results.values() if "error" not in result]
        if results:
            self.results[model.name] = results
            self.metrics[model.name] = {
                **self.talk.summary(good),
                "failed": len(self.talk) - len(good),
                "first_error": next((r["error"] for r in results.values() if "error" in r), None),
                "identity": identity,
            }
            self._write()

    def judge(self, service: "Service") -> None:
        """Every pair of answers, but for those that were judged."""
        from minimind.cli.models import report_dropped
        from minimind.evaluation.judge import judge, make_trials, verdicts
        from minimind.evaluation.runner import file_name

        answers = {
            model: {name: r["answer"] for name, r in results.items() if "error" not in r}
            for model, results in self.results.items()
        }
        trials = make_trials(list(self.talk.prompts.values()), answers)
        identity = service.identity()
        where = file_name(f"{service.name} {identity['url']}")
        reporter = console.RichReporter()
        reporter.start(f"judge {service.name}", len(trials), unit="verdict")
        try:
            judged = judge(
                lambda messages: service.answer(messages, max_tokens=_VERDICT, temperature=0).text,
                trials,
                self.out / f"judge-{where}.jsonl",
                identity=identity,
                fresh=self.fresh,
                progress=reporter.progress,
            )
        except MinimindError as error:
            self.fail(f"judge {service.name}", error)
            return
        finally:
            reporter.stop()
        report_dropped(service)
        verdict = {"name": service.name, **verdicts(trials, judged, list(answers))}
        if verdict["failed"]:
            missing = ServiceError(
                f"{verdict['failed']:,} of {len(trials):,} replies did not come (the first: "
                f"{verdict['first_error']}); the same command asks for them again"
            )
            self.fail(f"judge {service.name}", missing)
        self.judgement = {"judge": verdict, "trials": trials, "judged": judged}
        self._write()

    def _write(self) -> None:
        from minimind.evaluation.comparison import compared, write_comparison

        self.compared = compared(self.talk, self.results, self.metrics, **self.judgement)
        write_comparison(self.out, self.compared)
        if self.json:
            console.write_json(self.json, self.compared)

    def show(self) -> None:
        """The tables, and what failed."""
        if self.compared:
            self._show_tables()
        if self.talk.bad.total:
            told = console.count(
                self.talk.bad.total, "line is no question", "lines are no questions"
            )
            console.say(strip_controls(f"{told}, the first: {self.talk.bad.first}"))
        for name, metrics in self.metrics.items():
            if metrics["first_error"]:
                console.say(
                    strip_controls(
                        f"{name}: {metrics['failed']:,} failed, the first: {metrics['first_error']}"
                    )
                )
        if self.compared:
            console.say(f"All answers: {self.out / 'compare.html'}, .md and .json")
        for failure in self.failures:
            console.say(strip_controls(f"failed: {failure}"))

    def _show_tables(self) -> None:
        from minimind.evaluation.comparison import (
            RANKING,
            category_rows,
            describe_answer,
            describe_judge,
            metric_rows,
            ranking_rows,
        )

        models = [strip_controls(model) for model in self.metrics]
        questions = self.compared["questions"]

        def shown(answer: dict[str, Any] | None) -> str:
            if answer is None or "error" in answer:
                return "–" if answer is None else strip_controls(f"failed: {answer['error']}")
            text = strip_controls(answer["answer"])
            cut = "…" if len(text) > _EXCERPT else ""
            return f"{text[:_EXCERPT]}{cut}\n({', '.join(describe_answer(answer))})"

        rows = [
            [
                strip_controls(one["question"]),
                *(shown(one["answers"].get(model)) for model in self.metrics),
            ]
            for one in questions[:_SHOWN]
        ]
        title = "Answers" if len(questions) <= _SHOWN else f"The first {_SHOWN} answers"
        console.show(console.table(title, ["question", *models], rows))
        rows = metric_rows(self.compared)
        console.show(console.table("Metrics", ["", *models], rows, numbers=len(models)))
        if rows := [[*map(strip_controls, row)] for row in category_rows(self.compared)]:
            head = ["category", "questions", *models]
            console.show(console.table("By category", head, rows, numbers=len(head) - 1))
        if self.compared["judge"]:
            rows = [[*map(strip_controls, row)] for row in ranking_rows(self.compared)]
            console.show(console.table("Ranking", list(RANKING), rows, numbers=3))
            console.say(strip_controls(describe_judge(self.compared["judge"])))
