"""Math word problems (GSM8K, CMATH), scored by the final number of an answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_objects
from minimind.data.registry import download_hint
from minimind.errors import DataError
from minimind.evaluation.generative import GenerativeQuestion, GenerativeTask
from minimind.evaluation.number_extraction import is_same_number, last_number
from minimind.evaluation.tasks import evenly_spaced
from minimind.paths import expand_user


@dataclass(frozen=True)
class _Format:
    """Names of a benchmark's fields, its splits, and the maximum answer length in tokens.

    mark: what its published answers contain.
    """

    question: str
    answer: str
    splits: tuple[str, ...]
    max_new_tokens: int
    mark: str = ""

    def describes(self, path: Path) -> bool:
        """Return True if the first record of a file has these fields."""
        for _, _, row in read_objects([path], invalid=InvalidRecords()):
            return self.question in row and self.mark in str(row.get(self.answer))
        return False


_FORMATS = {
    "gsm8k": _Format("question", "answer", ("test",), 320, mark="####"),
    "cmath": _Format("input", "golden", ("test", "cmath_dev"), 256),
}


def math_task(
    kind: str, sources: Sequence[str], limit: int | None, name: str | None = None
) -> GenerativeTask:
    """Return the task `gsm8k` or `cmath`, read from the first source that has it."""
    layout = _FORMATS[kind]
    invalid = InvalidRecords()
    questions = []
    for _, line, row in read_objects([_find_file(kind, sources)], invalid=invalid):
        if row.get("split", layout.splits[0]) not in layout.splits:
            continue
        question = row.get(layout.question)
        # GSM8K puts a worked solution and "####" before the answer.
        answer = str(row.get(layout.answer, "")).rpartition("####")[2].strip()
        if not isinstance(question, str) or last_number(answer) is None:
            invalid.add(
                Path(kind), line, f"no {layout.question}, or no number in {layout.answer}", row
            )
            continue
        invalid.num_valid += 1
        questions.append(
            GenerativeQuestion(
                f"{kind}-{line}",
                question,
                answer,
                _score_by_number(answer),
                subject=f"grade {row['grade']}" if "grade" in row else "",
            )
        )
    if not questions:
        detail = f"; the first error: {invalid.first}" if invalid.total else ""
        raise DataError(f"{', '.join(sources)}: contains no {kind} question{detail}")
    chosen = evenly_spaced(questions, limit)
    return GenerativeTask(name or kind, chosen, layout.max_new_tokens, invalid, kind)


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
        ):
            if matches := sorted(path.glob(pattern)):
                return matches[0]
        for match in sorted(path.glob("**/test.jsonl")):  # another benchmark may have one
            if _FORMATS[name].describes(match):
                return match
    raise DataError(
        f"{', '.join(sources) or '--data'}: found no {name}.jsonl; put it there, or give its path "
        f"with --task {name}:PATH{download_hint(name)}"
    )
