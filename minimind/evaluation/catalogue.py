"""The tasks by name."""

from collections.abc import Sequence

from minimind.errors import UsageError
from minimind.evaluation.benchmark_prompts import Style
from minimind.evaluation.benchmarks import read_benchmark
from minimind.evaluation.bits_per_byte import BitsPerByte
from minimind.evaluation.generative import arithmetic_task, quiz_task
from minimind.evaluation.multiple_choice import MultipleChoice
from minimind.evaluation.open_ended import degeneration_task
from minimind.evaluation.tasks import Task

BENCHMARK_TASKS = ("ceval", "cmmlu", "mmlu", "c3", "choice")
TASKS = ("bpb", *BENCHMARK_TASKS, "gsm8k", "cmath", "quiz", "degeneration", "lm-eval:NAME")


def make_task(
    wanted: str,
    *,
    data: Sequence[str] = (),
    style: Style = "chat",
    shots: int = 5,
    limit: int | None = None,
) -> Task:
    """The task of a command line: NAME, or NAME:PATH where its data is somewhere of its own.

    Raises UsageError for an unknown one, and DataError when its data is not there.
    """
    name, _, place = wanted.partition(":")
    places = [place] if place else list(data)
    if name == "bpb":
        return BitsPerByte(places, limit)
    if name == "quiz":
        return quiz_task(limit)
    if name == "degeneration":
        return degeneration_task(place, limit)
    if name in ("gsm8k", "cmath"):
        return arithmetic_task(name, places, limit)
    if name not in BENCHMARK_TASKS:
        raise UsageError(
            f"--task {wanted}: known are {', '.join(TASKS)}; NAME:PATH says where its data is"
        )
    if name == "choice" and not places:
        raise UsageError("choice needs a file of question,A,B,C,D,answer: --task choice:FILE.csv")
    if not places:
        raise UsageError(f"{name} needs its questions: --data DIR, or --task {name}:PATH")
    return MultipleChoice(read_benchmark(name, places), style, shots, limit)
