"""The steps that `eval` and `compare` share: open models, run tasks, collect failures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind.cli import console
from minimind.cli.terminal import strip_controls
from minimind.errors import MinimindError

if TYPE_CHECKING:
    from minimind.evaluation.contamination import Contamination
    from minimind.evaluation.tasks import Task

Metrics = dict[str, Any]


@dataclass(frozen=True)
class OpenedModel:
    """A model and the folder of its results.

    identity: everything that the results depend on besides the task.
    """

    model: Any
    folder: Path
    identity: Mapping[str, Any]


@dataclass
class Evaluation:
    """Options and failures of a command that evaluates several models.

    A failure is reported at once and again at the end; the evaluation continues with the rest.
    """

    out: Path
    fresh: bool
    json: Path | None
    device: str
    failures: list[str] = field(default_factory=list, kw_only=True)
    hinted: set[Path] = field(default_factory=set, kw_only=True)  # models only pretrained

    def fail(self, subject: str, error: Exception) -> None:
        """Report a failure."""
        from minimind.evaluation.tasks import format_error

        # Messages about models and files begin with the same path.
        message = strip_controls(format_error(error).removeprefix(f"{subject}: "))
        self.failures.append(f"{strip_controls(subject)}: {message}")
        console.say(f"{strip_controls(subject)} failed: {message}")

    def open_model(
        self,
        name: str,
        *,
        taken: Mapping[str, Any],
        adapter: Path | None = None,
        context: int | None = None,
    ) -> OpenedModel | None:
        """Open a model under a name that is not in `taken`; return None if that fails."""
        from minimind.cli.models import open_model
        from minimind.evaluation.runner import file_name

        try:
            model = open_model(name, self.device, adapter=adapter, context=context, taken=taken)
            identity = model.identity()
        except (MinimindError, OSError) as error:
            self.fail(name, error)
            return None
        return OpenedModel(model, self.out / file_name(model.name), identity)

    def run_task(
        self,
        opened: OpenedModel,
        task: "Task",
        title: str,
        contamination: "Contamination | None" = None,
    ) -> Metrics | None:
        """Run a task with a progress bar and return its metrics, None if it fails."""
        from minimind.cli.models import report_dropped
        from minimind.evaluation.runner import evaluate

        self._hint(opened, task)
        reporter = console.RichReporter()
        reporter.start(title, len(task), unit=task.unit)
        try:
            return evaluate(
                task,
                opened.model,
                opened.folder,
                identity=opened.identity,
                contamination=contamination,
                fresh=self.fresh,
                progress=reporter.progress,
            )
        except MemoryError:
            raise
        except Exception as error:
            self.fail(title, error)
            return None
        finally:
            reporter.stop()
            report_dropped(opened.model)

    def _hint(self, opened: OpenedModel, task: "Task") -> None:
        """Say once, before a model answers questions, that it was only pretrained."""
        from minimind.cli.models import pretrained_only_hint
        from minimind.evaluation.generative import GenerativeTask
        from minimind.evaluation.open_ended import OpenEndedTask

        directory: Path | None = getattr(opened.model, "directory", None)  # None for a service
        if not isinstance(task, GenerativeTask | OpenEndedTask) or directory is None:
            return
        if opened.model.adapter is None and directory not in self.hinted:
            self.hinted.add(directory)
            if hint := pretrained_only_hint(directory):
                console.say(hint)

    def show_failures(self) -> None:
        """Report all failures again, after the tables."""
        for failure in self.failures:
            console.say(f"failed: {failure}")
