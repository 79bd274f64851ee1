"""Open-ended questions, whose answers are measured and compared instead of scored."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from minimind.data.input_files import list_files
from minimind.data.invalid import InvalidRecords
from minimind.data.messages import Fields, read_turns, role_of
from minimind.data.read import read_objects
from minimind.data.schemas import TURNS
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
from minimind.tokenizer.chat import Message

_QUESTION_KEYS = ("question", "prompt", "instruction", "query", "q", "input", "text")
_CATEGORY_KEYS = ("category", "class", "subject")
_ID_KEYS = ("id", "question_id")
_HASHED = ("id", "question", "category")  # also if empty
_MESSAGES_KEYS = ("turns", *TURNS)


@dataclass(frozen=True)
class Prompt:
    """A user message. after: ids of those before it in its conversation; most have none."""

    id: str
    question: str
    category: str = ""
    after: tuple[str, ...] = ()
    system: str = ""


@dataclass(frozen=True)
class _Dialogue:
    """The user messages of a record, and its system message, if any."""

    id: str
    questions: tuple[str, ...]
    category: str = ""
    system: str = ""


def read_prompts(
    path: str | None = None, limit: int | None = None
) -> tuple[list[Prompt], InvalidRecords]:
    """Read questions from a file, or return the eight built-in ones.

    A text file has one question per line. A record has its question in one of several fields, or
    it is a conversation, and optionally has a category. The user messages of a conversation become
    one prompt each; its answers are ignored, because the model gives its own. limit: the number of
    conversations, evenly spaced. Raises DataError if there are no questions.
    """
    if path is None:
        prompts = [Prompt(str(n), question) for n, question in enumerate(DEMO_QUESTIONS, start=1)]
        return evenly_spaced(prompts, limit), InvalidRecords(num_valid=len(prompts))
    invalid, dialogues = InvalidRecords(), []
    for file, line, row in read_objects(list_files(path), invalid=invalid):
        if ".txt" in (suffix.lower() for suffix in file.suffixes):
            texts = str(row["text"]).split("\n")
            read = [
                _Dialogue(str(n), (text.strip(),))
                for n, text in enumerate(texts, start=line)
                if text.strip()
            ]
        else:
            try:
                read = [_parse_dialogue(line, row)]
            except ValueError as error:
                invalid.add(file, line, str(error), row)
                continue
        invalid.num_valid += len(read)
        dialogues += read
    if not dialogues:
        raise DataError(f"{path}: contains no question; the first error: {invalid.first}")
    ids = Counter[str]()
    groups = [_to_prompts(dialogue, ids) for dialogue in dialogues]
    return list(chain.from_iterable(evenly_spaced(groups, limit))), invalid


def _to_prompts(dialogue: _Dialogue, ids: Counter[str]) -> list[Prompt]:
    """Return a prompt per user message. ids: how often each id has occurred so far."""
    prompts: list[Prompt] = []
    for turn, question in enumerate(dialogue.questions, 1):
        name = dialogue.id if turn == 1 else f"{prompts[0].id} turn {turn}"
        while name in ids:
            ids[name] += 1
            name += f" {ids[name]}"
        ids[name] = 1
        after = tuple(prompt.id for prompt in prompts)
        prompts.append(Prompt(name, question, dialogue.category, after, dialogue.system))
    return prompts


def _parse_dialogue(line: int, row: Mapping[str, Any]) -> _Dialogue:
    """Return the questions of a record. Raises ValueError with the reason if there is none."""
    ids = (str(row[key]) for key in _ID_KEYS if isinstance(row.get(key), str | int))
    category = " ".join(_first_string(row, _CATEGORY_KEYS).split())
    system, questions = _find_messages(row)
    if not questions:
        raise ValueError(f"no question; its fields: {', '.join(map(str, row))}")
    return _Dialogue(next(ids, str(line)), tuple(questions), category, system)


def _find_messages(row: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the system message or "", and all user messages of a record."""
    system = _first_string(row, ("system",))
    for key in _MESSAGES_KEYS:
        value = row.get(key)
        if not isinstance(value, list) or not value:
            continue
        if key == "turns" and all(isinstance(message, str) for message in value):
            return system, _strip_all(value)
        # The answers are not read, so they may be anything.
        asked = [message for message in value if not _is_answer(message)]
        turns = read_turns(asked, Fields(row), key) if asked else []
        systems = [turn.content for turn in turns if turn.role == "system"]
        questions = (turn.content for turn in turns if turn.role == "user")
        return "\n".join(systems).strip() or system, _strip_all(questions)
    question = _first_string(row, _QUESTION_KEYS)
    if "instruction" in row and row.get("input") and isinstance(row["input"], str):
        question += "\n" + row["input"].strip()
    history = row["history"] if isinstance(row.get("history"), list) else []
    earlier = [pair[0] for pair in history if isinstance(pair, list) and pair]
    return system, _strip_all([*(text for text in earlier if isinstance(text, str)), question])


def _is_answer(message: object) -> bool:
    role = (message.get("role") or message.get("from")) if isinstance(message, dict) else None
    return isinstance(role, str) and role_of(role) == "assistant"


def _strip_all(texts: Iterable[str]) -> list[str]:
    """Strip the texts; leave out those that are blank."""
    return [stripped for text in texts if (stripped := text.strip())]


def _first_string(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return the first field that is a non-empty string, or an empty string."""
    texts = (row[key].strip() for key in keys if isinstance(row.get(key), str))
    return next(filter(None, texts), "")


class OpenEndedTask:
    """Answers to open-ended questions, measured by length, speed and degeneration.

    Conversations are separate. A message is asked after the model's answers to those before it.
    name, kind: see Task.
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
        # Without the keys that only conversations have, the hash is that of earlier versions.
        prompts = json.dumps(
            [
                {key: value for key, value in asdict(prompt).items() if value or key in _HASHED}
                for prompt in self.prompts.values()
            ]
        )
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

    def run(self, model: Model, done: Mapping[str, Result]) -> Iterator[Result]:
        """Yield results in order of completion: those of all first messages, then of all second."""
        return to_results(self._outcomes(model, done))

    def _outcomes(
        self, model: Model, done: Mapping[str, Result]
    ) -> Iterator[tuple[str, Result | Exception]]:
        texts = {name: result["answer"] for name, result in done.items()}
        remaining = [prompt for name, prompt in self.prompts.items() if name not in done]
        for turn in range(max((len(prompt.after) for prompt in remaining), default=-1) + 1):
            prompts = []
            for prompt in remaining:
                if len(prompt.after) != turn:
                    continue
                if missing := [name for name in prompt.after if name not in texts]:
                    yield prompt.id, {"error": f"the message before it, {missing[0]}, failed"}
                else:
                    prompts.append(prompt)
            conversations = [self._conversation(prompt, texts) for prompt in prompts]
            for index, answer in model.answers(conversations, self.generation):
                name = prompts[index].id
                if isinstance(answer, Exception):
                    yield name, answer
                    continue
                texts[name] = answer.text
                result = {"answer": answer.text, "tokens": answer.tokens}
                yield name, result | {"ended": answer.ended, "seconds": answer.seconds}

    def _conversation(self, prompt: Prompt, answers: Mapping[str, str]) -> list[Message]:
        """Return the messages up to a prompt, with the given answers, by prompt id."""
        messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
        for name in prompt.after:
            messages.append({"role": "user", "content": self.prompts[name].question})
            messages.append({"role": "assistant", "content": answers[name]})
        return [*messages, {"role": "user", "content": prompt.question}]

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
