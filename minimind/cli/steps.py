"""The steps from data to a chat model and its report, shared by `minimind demo` and `road`.

Every step looks for its result first, so that the same command resumes where it was stopped.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from minimind.cli import console
from minimind.cli.plan import duration
from minimind.errors import UsageError, same_command
from minimind.files import read_json, write_json

if TYPE_CHECKING:
    from minimind.config.settings import Recipe
    from minimind.model import Transformer
    from minimind.tokenizer import Tokenizer
    from minimind.training.stage import StageResult

STAGE_METRICS = ("seconds", "tokens", "tokens_per_second", "bits_per_byte")
_ESTIMATE_AFTER = 20  # steps of pretraining
_RESULT_FOLDERS = ("tokenizer", "model", "report-plots")
_TIME_FILE = "time.json"  # exists from the first step on
_RESULT_FILES = ("summary.json", _TIME_FILE, "report.html", "report.md")


@dataclass(frozen=True)
class Step:
    """A step under a heading. `run` does what is not done yet."""

    title: str
    run: Callable[[], object]


def run_steps(steps: Sequence[Step]) -> None:
    """Run the steps in order, each under its number and title."""
    for number, step in enumerate(steps, 1):
        console.heading(f"{number}/{len(steps)}", step.title)
        step.run()


@contextmanager
def timed(out: Path, command: str) -> Iterator[Callable[[], float]]:
    """Yield a function that returns the seconds spent on the steps, earlier sessions included.

    command: demo or road, stored with the time.

    `_TIME_FILE` stores the seconds of earlier sessions and the start time of the running one. A
    session that was killed counts up to the last change of a metrics file.
    """
    path = out / _TIME_FILE
    stored = _stored_time(out) or {"seconds": 0.0}
    before = stored["seconds"]
    if (began := stored.get("began")) is not None:
        changes = [file.stat().st_mtime for file in (path, *out.glob("*/metrics.jsonl"))]
        before += max(0.0, max(changes) - began)
    started, clock = time.time(), time.perf_counter()

    def total() -> float:
        seconds: float = before + time.perf_counter() - clock
        return seconds

    stored = {"command": command, "seconds": before}
    write_json(path, stored | {"began": started})
    try:
        yield total
    finally:
        write_json(path, stored | {"seconds": total()})


def _stored_time(out: Path) -> dict[str, Any] | None:
    """Return the content of `_TIME_FILE`; None if there is none, or one of another program."""
    try:
        stored = read_json(out / _TIME_FILE)
    except (OSError, ValueError):
        return None
    seconds = stored.get("seconds") if isinstance(stored, dict) else None
    return stored if isinstance(seconds, int | float) else None


def check_results(
    out: Path, command: str, folders: Iterable[str], files: Iterable[str] = (), *, fresh: bool
) -> None:
    """Raise UsageError if something existing that would be replaced is not from an earlier run.

    command: demo or road; the results of the other one are not its own. folders, files: the
    command's own, by name. fresh: `remove_results` follows. Without it no folder but the final
    model would be replaced.
    """
    stored = _stored_time(out)
    owner = stored.get("command", command) if stored else command
    if owner != command:
        raise UsageError(f"{out} holds the results of `minimind {owner}`; choose another --out")
    names = ("model", *_RESULT_FILES, *files)
    if fresh:
        names += (*_RESULT_FOLDERS, *folders)
    for path in (out / name for name in names):
        if path.exists() and stored is None:
            raise UsageError(
                f"{path} exists, but {out} has no {_TIME_FILE} of minimind, so it is not from an "
                "earlier run of this command. Choose another --out, or move it away first"
            )


def remove_results(out: Path, folders: Iterable[str], files: Iterable[str] = ()) -> None:
    """Remove the results of all steps. folders, files: the command's own, by name."""
    for name in (*_RESULT_FOLDERS, *folders):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (*_RESULT_FILES, *files):
        (out / name).unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory name that replaces `path` when the block has succeeded."""
    temporary = path.with_name(f"{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    yield temporary
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)


def train_tokenizer_once(
    directory: Path, read_texts: Callable[[], Iterable[str]], vocab_size: int
) -> "Tokenizer":
    """Train the tokenizer unless it exists, and load it."""
    from minimind.tokenizer import Tokenizer, train_tokenizer

    if not directory.is_dir():
        with new_directory(directory) as temporary:
            train_tokenizer(read_texts(), vocab_size=vocab_size).save(temporary)
    return Tokenizer.load(directory)


class _EstimatingReporter(console.RichReporter):
    """Report the training time of all stages once the first steps have shown the speed."""

    def __init__(self, tokens: int, tokens_per_step: int) -> None:
        super().__init__()
        self._tokens, self._tokens_per_step = tokens, tokens_per_step
        self._started: tuple[int, float] | None = None  # the first step seen, and its time
        self._counts_steps = False

    def start(self, title: str, total: int, done: int = 0, unit: str = "step") -> None:
        """Begin a task; only tasks that count training steps show the speed."""
        super().start(title, total, done, unit)
        self._counts_steps = unit == "step"

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Draw progress; after `_ESTIMATE_AFTER` steps, report the estimate once."""
        super().progress(done, total, note)
        if self._counts_steps and self._tokens_per_step and total > _ESTIMATE_AFTER:
            if self._started is None:
                self._started = done, time.perf_counter()
            elif done - self._started[0] >= _ESTIMATE_AFTER:
                tokens = (done - self._started[0]) * self._tokens_per_step
                rate = tokens / (time.perf_counter() - self._started[1])
                self.say(
                    f"At {rate:,.0f} tokens/s, training takes about {duration(self._tokens / rate)}"
                    " on this machine, all stages together"
                )
                self._tokens_per_step = 0


def planned_tokens(recipe: "Recipe") -> int:
    """Return the training tokens of a recipe that sets its number of steps, else 0."""
    training = recipe.training
    return (training.steps or 0) * training.global_batch_size * recipe.data.seq_len


def train_stage(recipe: "Recipe", tokens_of_all_stages: int | None) -> "StageResult":
    """Train a stage, or resume it; pretraining also estimates the time of all stages.

    tokens_of_all_stages: as `weighted_tokens`; None if unknown. Raises typer.Exit after Ctrl-C.
    """
    from minimind.inference.generate import sampler
    from minimind.training.stage import run_stage

    per_step = recipe.training.global_batch_size * recipe.data.seq_len
    estimates = recipe.objective == "pretrain" and tokens_of_all_stages is not None
    reporter = _EstimatingReporter(tokens_of_all_stages or 0, per_step if estimates else 0)
    result = run_stage(recipe, reporter=reporter, generate_samples=sampler(recipe, reporter.say))
    if not result.finished:
        console.say(f"stopped; run {same_command()} again to resume")
        raise typer.Exit(130)
    summary = result.summary
    quality = ""  # without held-out data
    if "accuracy" in summary:
        quality = f", {summary['accuracy']:.1%} preference accuracy on held-out pairs"
    elif "bits_per_byte" in summary:
        quality = f", {summary['bits_per_byte']:.3f} bits per byte on held-out text"
    console.say(
        f"{summary['tokens']:,} tokens in {summary['seconds']:.0f} s "
        f"({summary['tokens_per_second']:,.0f} tokens/s){quality}"
    )
    return result


def finished_summary(out: Path, command: str) -> dict[str, Any] | None:
    """Return the summary of the last step if it is finished, and say so.

    Raises UsageError if an older version wrote it.
    """
    path = out / "summary.json"
    if not path.is_file():
        return None
    summary: dict[str, Any] = json.loads(path.read_text("utf-8"))
    if "questions" not in summary:
        raise UsageError(
            f"{path} was written by an older version of minimind, which stored other results; keep "
            f"{out} and choose another --out, or discard the results with --fresh"
        )
    console.say(f"already finished; --fresh discards the results and runs the {command} again")
    return summary


def copy_final_model(trained: Path | None, out: Path) -> None:
    """Copy the model of the last stage to `out/model`, so that `out` can be used as a model."""
    assert trained is not None, "an interrupted stage ends the command"
    with new_directory(out / "model") as directory:
        shutil.copytree(trained, directory)


def continue_as_dialogue(
    model: "Transformer", tokenizer: "Tokenizer", questions: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Return the answers of a model that is only pretrained, which continues a written dialogue."""
    from minimind.inference.generate import continue_all

    prompts = [f"问：{question}答：" for question in questions]
    texts = continue_all(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    return [text.split("问：")[0] for text in texts]


def show_next_commands(out: Path, adapted: tuple[Path, Path] | None) -> None:
    """Print where the report is, and commands that use the model in `out`.

    adapted: a model and an adapter for it.
    """
    console.say(f"Report with all curves: {out / 'report.html'}")
    console.say(f"Chat with your model: {console.command('chat', out)}")
    if adapted:
        model, adapter = adapted
        command = console.command("chat", model, "--adapter", adapter)
        console.say(f"Chat with the adapter: {command}")
    page = console.command("export", "web", out, "--out", out / "page")
    console.say(f"Put your model into a web page that runs without a server: {page}")
