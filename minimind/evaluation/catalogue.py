"""Evaluation tasks by name."""

from collections.abc import Sequence

from minimind.data.registry import downloaded_file, is_name
from minimind.errors import UsageError
from minimind.evaluation.benchmark_prompts import Style
from minimind.evaluation.benchmarks import is_archive, read_benchmark
from minimind.evaluation.bits_per_byte import BitsPerByte
from minimind.evaluation.math_word_problems import math_task
from minimind.evaluation.multiple_choice import MultipleChoice
from minimind.evaluation.open_ended import degeneration_task
from minimind.evaluation.quiz import quiz_task
from minimind.evaluation.tasks import Task
from minimind.paths import expand_user

BENCHMARK_TASKS = ("ceval", "cmmlu", "mmlu", "c3", "choice")
_DATA_READERS = ("bpb", *BENCHMARK_TASKS, "gsm8k", "cmath")
TASKS = ("bpb", *BENCHMARK_TASKS, "gsm8k", "cmath", "quiz", "degeneration", "lm-eval:NAME")


def check_data(specs: Sequence[str], data: Sequence[str]) -> None:
    """Raise UsageError if a file of `data` would be the questions of several tasks.

    In a folder or an archive, each task finds its own files.
    """
    readers = [spec for spec in dict.fromkeys(specs) if spec in _DATA_READERS]
    files = [path for path in data if expand_user(path).is_file() and not is_archive(path)]
    if files and len(readers) > 1:
        paths = " ".join(f"--task {name}:PATH" for name in readers)
        raise UsageError(
            f"--data {files[0]}: this file would be the data of {' and '.join(readers)}; name the "
            f"data of each task: {paths}"
        )


def make_task(
    spec: str,
    *,
    data: Sequence[str] = (),
    style: Style = "chat",
    shots: int = 5,
    limit: int | None = None,
) -> Task:
    """Create the task NAME, or NAME:PATH to read its data from PATH instead of from `data`.

    Without either, a published benchmark is read from where it was downloaded to. A PATH is part of
    the task's name, so that results of other data have other names.

    Raises UsageError for an unknown name, and DataError if the data is missing.
    """
    name, _, path = spec.partition(":")
    sources = [path] if path else list(data)
    if not sources and is_name(name):
        sources = [str(downloaded_file(name))]
    if name == "bpb":
        return BitsPerByte(sources, limit, spec if path else name)
    if name == "quiz":
        if path:
            raise UsageError(f"--task {spec}: the quiz reads no data; give --task quiz")
        return quiz_task(limit)
    if name == "degeneration":
        return degeneration_task(path, limit)
    if name in ("gsm8k", "cmath"):
        return math_task(name, sources, limit, spec if path else name)
    if name not in BENCHMARK_TASKS:
        raise UsageError(
            f"--task {spec}: unknown task; choose from {', '.join(TASKS)}; "
            "NAME:PATH gives the path of its data"
        )
    if name == "choice" and not sources:
        raise UsageError(
            "choice needs a file with the columns question, A, B, C, D, answer: give "
            "--task choice:FILE.csv"
        )
    if not sources:
        raise UsageError(f"{name} needs its data: give --data DIR, or --task {name}:PATH")
    questions = read_benchmark(name, sources)
    return MultipleChoice(questions, style, shots, limit, spec if path else None)
