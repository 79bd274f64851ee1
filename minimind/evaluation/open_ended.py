"""Questions to talk about: nothing marks their answers, which are kept, measured and compared."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from minimind.data.input_files import list_files
from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_objects
from minimind.data.textbook import DEMO_QUESTIONS
from minimind.errors import DataError
from minimind.evaluation.degeneration import Answered, describe, summarise
from minimind.evaluation.tasks import (
    MAX_CONSECUTIVE_ERRORS,
    GenerationConfig,
    Model,
    Result,
    spread,
    told,
)

_QUESTION = ("question", "prompt", "instruction", "query", "q", "input", "text")
_CATEGORY = ("category", "class", "subject")
_ID = ("id", "question_id")
_TURNS = ("turns", "messages", "conversations")


@dataclass(frozen=True)
class Prompt:
    """What is asked, by itself, at the beginning of a conversation."""

    id: str
    question: str
    category: str = ""


def read_prompts(
    place: str | None = None, limit: int | None = None
) -> tuple[list[Prompt], InvalidRecords]:
    """The questions of a file, and its lines that are none; without a file the eight.

    A text file has a question a line. Elsewhere a record has it in a field of one of many names,
    or as the first turn of a conversation, and maybe a category. Raises DataError when there are
    none.
    """
    if place is None:
        prompts = [Prompt(str(n), question) for n, question in enumerate(DEMO_QUESTIONS, start=1)]
        return spread(prompts, limit), InvalidRecords(num_valid=len(prompts))
    bad, prompts, taken = InvalidRecords(), [], Counter[str]()
    for file, line, row in read_objects(list_files(place), invalid=bad):
        if ".txt" in (suffix.lower() for suffix in file.suffixes):
            texts = str(row["text"]).split("\n")
            found = [Prompt(str(n), text.strip()) for n, text in enumerate(texts, start=line)]
        else:
            found = [_from_row(line, row)]
            if not found[0].question:
                bad.add(file, line, f"no question; it has: {', '.join(map(str, row))}", row)
        for prompt in found:
            if prompt.question:
                bad.num_valid += 1
                taken[prompt.id] += 1
                again = f" {taken[prompt.id]}" if taken[prompt.id] > 1 else ""
                prompts.append(Prompt(prompt.id + again, prompt.question, prompt.category))
    if not prompts:
        raise DataError(f"{place}: no line is a question; the first: {bad.first}")
    return spread(prompts, limit), bad


def _from_row(line: int, row: Mapping[str, Any]) -> Prompt:
    name = next((str(row[key]) for key in _ID if isinstance(row.get(key), str | int)), str(line))
    return Prompt(name, _asked(row), " ".join(_string(row, _CATEGORY).split()))


def _asked(row: Mapping[str, Any]) -> str:
    for key in _TURNS:
        for turn in row[key] if isinstance(row.get(key), list) else ():
            if isinstance(turn, str):
                return turn.strip()
            if isinstance(turn, dict) and (turn.get("role") or turn.get("from")) != "system":
                return _string(turn, ("content", "value"))
    question = _string(row, _QUESTION)
    if "instruction" in row and row.get("input") and isinstance(row["input"], str):
        question += "\n" + row["input"].strip()
    return question


def _string(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The first of the fields that holds text."""
    texts = (row[key].strip() for key in keys if isinstance(row.get(key), str))
    return next(filter(None, texts), "")


class OpenEndedTask:
    """A task: answers to questions, each in a conversation of its own, and how they degenerate."""

    unit = "question"

    def __init__(
        self,
        name: str,
        prompts: Sequence[Prompt],
        manner: GenerationConfig,
        bad: InvalidRecords | None = None,
    ) -> None:
        self.name, self.bad, self.manner = name, bad or InvalidRecords(), manner
        self.prompts = {prompt.id: prompt for prompt in prompts}

    def __len__(self) -> int:
        return len(self.prompts)

    def settings(self) -> dict[str, Any]:
        """The questions too."""
        whole = json.dumps([asdict(prompt) for prompt in self.prompts.values()])
        return {
            "task": self.name,
            "max_new_tokens": self.manner.max_new_tokens,
            "temperature": self.manner.temperature,
            "seed": self.manner.seed if self.manner.temperature else None,
            "questions": len(self),
            "sha256": hashlib.sha256(whole.encode()).hexdigest(),
        }

    def texts(self) -> dict[str, str]:
        """None: there is no score that knowing them would raise."""
        return {}

    def run(self, model: Model, done: Collection[str]) -> Iterator[Result]:
        """In the order in which answers end."""
        left = [prompt for name, prompt in self.prompts.items() if name not in done]
        faults = 0
        for place, answer in model.answers([prompt.question for prompt in left], self.manner):
            if isinstance(answer, Exception):
                faults += 1
                if faults >= MAX_CONSECUTIVE_ERRORS:
                    raise answer
                yield {"id": left[place].id, "error": told(answer)}
                continue
            faults = 0
            yield {
                "id": left[place].id,
                "answer": answer.text,
                "tokens": answer.tokens,
                "ended": answer.ended,
                "seconds": answer.seconds,
            }

    def summary(self, results: Sequence[Result]) -> dict[str, Any]:
        """Degeneration, length and speed; by category where there are any."""
        metrics = self._metrics(results)
        groups: dict[str, list[Result]] = {}
        for result in results:
            groups.setdefault(self.prompts[result["id"]].category, []).append(result)
        if set(groups) - {""}:
            metrics["by_category"] = {
                name: self._metrics(some) for name, some in sorted(groups.items())
            }
        return metrics

    def described(self, result: Result) -> dict[str, Any]:
        """A result with the figures of its answer."""
        if "error" in result:
            return {"error": result["error"]}
        metrics = describe(self._answered(result))
        return {key: result[key] for key in ("answer", "tokens")} | {
            "characters": len(result["answer"]),
            **metrics,
        }

    def _answered(self, result: Result) -> Answered:
        prompt = self.prompts[result["id"]]
        return Answered(prompt.question, result["answer"], result["ended"])

    def _metrics(self, results: Sequence[Result]) -> dict[str, Any]:
        metrics = summarise([self._answered(result) for result in results])
        counted = [result for result in results if result["tokens"] is not None]
        tokens = sum(result["tokens"] for result in counted)
        seconds = sum(result["seconds"] for result in counted)
        shown = ("repeated", "never_end", "other_script", "mixed_scripts", "distinct_1")
        return metrics | {
            "interval": metrics["intervals"].get("repeated"),
            "tokens": tokens / len(counted) if counted else None,
            "characters": (
                sum(len(result["answer"]) for result in results) / len(results) if results else None
            ),
            "tokens_per_second": tokens / seconds if seconds else None,
            "metrics": {name: metrics[name] for name in shown},
        }


def degeneration_task(place: str, limit: int | None) -> OpenEndedTask:
    """Of the eight questions, or those of a file: greedily, up to 256 tokens."""
    prompts, bad = read_prompts(place or None, limit)
    return OpenEndedTask("degeneration", prompts, GenerationConfig(256), bad)
