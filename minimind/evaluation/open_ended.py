"""Open-ended questions, whose answers are measured and compared instead of scored."""

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
from minimind.evaluation.degeneration import AnsweredQuestion, measure, summarize
from minimind.evaluation.tasks import (
    GenerationConfig,
    Model,
    Result,
    evenly_spaced,
    to_results,
)

_QUESTION_KEYS = ("question", "prompt", "instruction", "query", "q", "input", "text")
_CATEGORY_KEYS = ("category", "class", "subject")
_ID_KEYS = ("id", "question_id")
_CONVERSATION_KEYS = ("turns", "messages", "conversations")


@dataclass(frozen=True)
class Prompt:
    """A question, asked as the first message of a conversation."""

    id: str
    question: str
    category: str = ""


def read_prompts(
    path: str | None = None, limit: int | None = None
) -> tuple[list[Prompt], InvalidRecords]:
    """Read questions from a file, or return the eight built-in ones.

    A text file has one question per line. A record has its question in one of several fields or in
    the first turn of a conversation, and optionally a category. Raises DataError if there are no
    questions.
    """
    if path is None:
        prompts = [Prompt(str(n), question) for n, question in enumerate(DEMO_QUESTIONS, start=1)]
        return evenly_spaced(prompts, limit), InvalidRecords(num_valid=len(prompts))
    invalid, prompts, ids = InvalidRecords(), [], Counter[str]()
    for file, line, row in read_objects(list_files(path), invalid=invalid):
        if ".txt" in (suffix.lower() for suffix in file.suffixes):
            texts = str(row["text"]).split("\n")
            candidates = [Prompt(str(n), text.strip()) for n, text in enumerate(texts, start=line)]
        else:
            candidates = [_parse_prompt(line, row)]
            if not candidates[0].question:
                invalid.add(file, line, f"no question; its fields: {', '.join(map(str, row))}", row)
        for prompt in candidates:
            if prompt.question:
                invalid.num_valid += 1
                ids[prompt.id] += 1
                suffix = f" {ids[prompt.id]}" if ids[prompt.id] > 1 else ""
                prompts.append(Prompt(prompt.id + suffix, prompt.question, prompt.category))
    if not prompts:
        raise DataError(f"{path}: contains no question; the first error: {invalid.first}")
    return evenly_spaced(prompts, limit), invalid


def _parse_prompt(line: int, row: Mapping[str, Any]) -> Prompt:
    ids = (str(row[key]) for key in _ID_KEYS if isinstance(row.get(key), str | int))
    category = " ".join(_first_string(row, _CATEGORY_KEYS).split())
    return Prompt(next(ids, str(line)), _find_question(row), category)


def _find_question(row: Mapping[str, Any]) -> str:
    """Return the first message that is not a system message, or the question field."""
    for key in _CONVERSATION_KEYS:
        for message in row[key] if isinstance(row.get(key), list) else ():
            if isinstance(message, str):
                return message.strip()
            if (
                isinstance(message, dict)
                and (message.get("role") or message.get("from")) != "system"
            ):
                return _first_string(message, ("content", "value"))
    question = _first_string(row, _QUESTION_KEYS)
    if "instruction" in row and row.get("input") and isinstance(row["input"], str):
        question += "\n" + row["input"].strip()
    return question


def _first_string(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return the first field that is a non-empty string, or an empty string."""
    texts = (row[key].strip() for key in keys if isinstance(row.get(key), str))
    return next(filter(None, texts), "")


class OpenEndedTask:
    """Answers to open-ended questions, measured by length, speed and degeneration.

    Each question is asked in a separate conversation. name, kind: see Task.
    """

    unit = "question"

    def __init__(
        self,
        name: str,
        prompts: Sequence[Prompt],
        generation: GenerationConfig,
        invalid: InvalidRecords | None = None,
        kind: str | None = None,
    ) -> None:
        self.name, self.kind = name, kind or name
        self.invalid, self.generation = invalid or InvalidRecords(), generation
        self.prompts = {prompt.id: prompt for prompt in prompts}

    def __len__(self) -> int:
        return len(self.prompts)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self.prompts

    def settings(self) -> dict[str, Any]:
        """Return the settings, with a hash of the questions."""
        prompts = json.dumps([asdict(prompt) for prompt in self.prompts.values()])
        return {
            "task": self.kind,
            "max_new_tokens": self.generation.max_new_tokens,
            "temperature": self.generation.temperature,
            "seed": self.generation.seed if self.generation.temperature else None,
            "questions": len(self),
            "sha256": hashlib.sha256(prompts.encode()).hexdigest(),
        }

    def texts(self) -> dict[str, str]:
        """Return no texts: there is no score that contamination could raise."""
        return {}

    def run(self, model: Model, done: Collection[str]) -> Iterator[Result]:
        """Yield results in order of completion."""
        remaining = [prompt for name, prompt in self.prompts.items() if name not in done]
        answers = model.answers([prompt.question for prompt in remaining], self.generation)

        def outcomes() -> Iterator[tuple[str, Result | Exception]]:
            for index, answer in answers:
                if isinstance(answer, Exception):
                    yield remaining[index].id, answer
                    continue
                yield (
                    remaining[index].id,
                    {
                        "answer": answer.text,
                        "tokens": answer.tokens,
                        "ended": answer.ended,
                        "seconds": answer.seconds,
                    },
                )

        return to_results(outcomes())

    def summary(self, results: Sequence[Result]) -> dict[str, Any]:
        """Return metrics of degeneration, length and speed, also by category if there are any."""
        metrics = self._metrics(results)
        by_category: dict[str, list[Result]] = {}
        for result in results:
            by_category.setdefault(self.prompts[result["id"]].category, []).append(result)
        if set(by_category) - {""}:
            metrics["by_category"] = {
                name: self._metrics(category) for name, category in sorted(by_category.items())
            }
        return metrics

    def with_metrics(self, result: Result) -> dict[str, Any]:
        """Return a result with the metrics of its answer."""
        if "error" in result:
            return {"error": result["error"]}
        return {
            "answer": result["answer"],
            "tokens": result["tokens"],
            "characters": len(result["answer"]),
            **measure(self._answered(result)),
        }

    def _answered(self, result: Result) -> AnsweredQuestion:
        prompt = self.prompts[result["id"]]
        return AnsweredQuestion(prompt.question, result["answer"], result["ended"])

    def _metrics(self, results: Sequence[Result]) -> dict[str, Any]:
        metrics = summarize([self._answered(result) for result in results])
        counted = [result for result in results if result["tokens"] is not None]
        tokens = sum(result["tokens"] for result in counted)
        seconds = sum(result["seconds"] for result in counted)
        characters = sum(len(result["answer"]) for result in results)
        main_metrics = ("repeated", "never_end", "other_script", "mixed_scripts", "distinct_1")
        return metrics | {
            "interval": metrics["intervals"].get("repeated"),
            "tokens": tokens / len(counted) if counted else None,
            "characters": characters / len(results) if results else None,
            "tokens_per_second": tokens / seconds if seconds else None,
            "metrics": {name: metrics[name] for name in main_metrics},
        }


def degeneration_task(path: str, limit: int | None) -> OpenEndedTask:
    """Return the task `degeneration`: greedy answers of up to 256 tokens.

    The questions are those of a file, or the eight built-in ones for an empty path.
    """
    prompts, invalid = read_prompts(path or None, limit)
    kind = "degeneration"
    name = f"{kind}:{path}" if path else kind
    return OpenEndedTask(name, prompts, GenerationConfig(256), invalid, kind)
