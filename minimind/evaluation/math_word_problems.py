"""Math word problems (GSM8K, CMATH), scored by the final number of an answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minimind.data.hub import download_hint
from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_objects
from minimind.errors import DataError
from minimind.evaluation.generative import GenerativeQuestion, GenerativeTask
from minimind.evaluation.number_extraction import is_same_number, last_number
from minimind.evaluation.tasks import evenly_spaced
from minimind.paths import expand_user


@dataclass(frozen=True)
class _Format:
    """Names of a benchmark's fields, the splits to use, and the longest answer in tokens."""

    question: str
    answer: str
    splits: tuple[str, ...]
    max_new_tokens: int


_FORMATS = {
    "gsm8k": _Format("question", "answer", ("test",), 320),
    "cmath": _Format("input", "golden", ("test", "cmath_dev"), 256),
}


def math_task(name: str, sources: Sequence[str], limit: int | None) -> GenerativeTask:
    """Return the task `gsm8k` or `cmath`, read from the first source that has it."""
    form = _FORMATS[name]
    bad = InvalidRecords()
    questions = []
    for _, line, row in read_objects([_find_file(name, sources)], invalid=bad):
        if row.get("split", form.splits[0]) not in form.splits:
            continue
        question = row.get(form.question)
        # GSM8K puts a worked solution and "####" before the answer.
        answer = str(row.get(form.answer, "")).rpartition("####")[2].strip()
        if not isinstance(question, str) or last_number(answer) is None:
            bad.add(Path(name), line, f"no {form.question}, or no number in {form.answer}", row)
            continue
        bad.num_valid += 1
        questions.append(
            GenerativeQuestion(
                f"{name}-{line}",
                question,
                answer,
                _score_by_number(answer),
                subject=f"grade {row['grade']}" if "grade" in row else "",
            )
        )
    if not questions:
        raise DataError(f"{', '.join(sources)}: contains no {name} question {bad.first}".rstrip())
    return GenerativeTask(name, evenly_spaced(questions, limit), form.max_new_tokens, bad)


def _score_by_number(expected: str) -> Callable[[str], dict[str, bool]]:
    return lambda answer: {"right": is_same_number(expected, answer)}


def _find_file(name: str, sources: Sequence[str]) -> Path:
    """Return the benchmark's file: <name>.jsonl, or test.jsonl as GSM8K is published."""
    for source in sources:
        path = expand_user(source)
        if path.is_file():
            return path
        for pattern in (
            f"{name}*.jsonl*",
            f"{name}*.parquet",
            f"**/{name}*/test.jsonl",
            "**/test.jsonl",
        ):
            if matches := sorted(path.glob(pattern)):
                return matches[0]
    raise DataError(
        f"{', '.join(sources) or '--data'}: found no {name}.jsonl; put it there, or give its path "
        f"with --task {name}:PATH{download_hint(name)}"
    )
