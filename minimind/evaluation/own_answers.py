"""Preference pairs from a model's own answers (SPIN: Chen et al. 2024, section 4).

The chosen side is a conversation of the data. In the rejected side the model's own answer takes the
place of the last one. Training on such pairs moves the model away from what it does and the data do
not, such as repetitions. Nobody has judged an answer, so they do not reflect human preferences.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind.data.input_files import list_files
from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_records
from minimind.data.schemas import Record
from minimind.errors import DataError
from minimind.evaluation.runner import open_results, read_results
from minimind.evaluation.tasks import GenerationConfig, Model, Result, to_results
from minimind.files import write_atomically
from minimind.tokenizer.chat import Message

_CUT = "\ufffd"  # the end of an answer that the token limit cut within a character


@dataclass(frozen=True)
class AnsweredData:
    """Conversations whose last answer a model is to replace.

    unsuitable: records that are left out because they do not end with a supervised answer.
    """

    conversations: Sequence[Sequence[Message]]
    unsuitable: int
    invalid: InvalidRecords


@dataclass(frozen=True)
class PairCounts:
    """Number of pairs, and of answers without one: equal to that of the data, empty, failed.

    cut: pairs whose rejected answer the token limit cut off.
    """

    pairs: int
    equal: int = 0
    empty: int = 0
    failed: int = 0
    cut: int = 0
    first_error: str = ""


def read_conversations(paths: Sequence[str], limit: int) -> AnsweredData:
    """Read at most `limit` conversations that end with an answer, evenly spaced over all.

    Raises DataError if there is none.
    """
    # Counted first, and then read again, because only `limit` of them have to fit into memory.
    invalid = InvalidRecords()
    ends = [_ends_with_answer(record) for record in _read(paths, invalid)]
    total = sum(ends)
    if not total:
        first = f"; the first invalid record: {invalid.first}" if invalid.total else ""
        raise DataError(f"{', '.join(paths)}: no conversation that ends with an answer{first}")
    chosen = {index * total // limit for index in range(limit)} if limit < total else range(total)
    suitable = (record for record in _read(paths, InvalidRecords()) if _ends_with_answer(record))
    conversations = [
        record.messages
        for number, record in enumerate(suitable)
        if number in chosen and record.messages
    ]
    return AnsweredData(conversations, len(ends) - total, invalid)


def check_conversations(paths: Sequence[str]) -> None:
    """Raise DataError if no conversation ends with an answer. Reads up to the first that does."""
    if not any(map(_ends_with_answer, _read(paths, InvalidRecords()))):
        read_conversations(paths, 1)


def _read(paths: Sequence[str], invalid: InvalidRecords) -> Iterator[Record]:
    for path in paths:
        yield from read_records(list_files(path), invalid=invalid)


def _ends_with_answer(record: Record) -> bool:
    """Return True for a conversation whose last message is an answer that is supervised."""
    if not record.messages or len(record.messages) < 2:
        return False
    [(messages, unsupervised)] = record.conversations
    return messages[-1]["role"] == "assistant" and len(messages) - 1 not in unsupervised


def part_of(out: Path) -> Path:
    """Return the file with the answers so far, until the pairs are written."""
    return out.with_name(f"{out.name}.part")


def write_pairs(
    model: Model,
    conversations: Sequence[Sequence[Message]],
    out: Path,
    *,
    generation: GenerationConfig,
    identity: Mapping[str, Any],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PairCounts:
    """Answer the conversations, and write a JSON Lines file of preference pairs.

    Each answer is written to `part_of(out)` at once, so that the same call continues after an
    interruption. The file stays if answers failed, so that they can be repeated. identity:
    everything that answers depend on besides the other arguments. Raises DataError if there is no
    pair, and UsageError if the file has answers of another model or to other conversations.
    """
    part = part_of(out)
    header = {
        "task": "own answers",
        "conversations": hashlib.sha256(json.dumps(list(conversations)).encode()).hexdigest(),
        "max_new_tokens": generation.max_new_tokens,
        "temperature": generation.temperature,
        "seed": generation.seed if generation.temperature else None,
        **identity,
    }
    results = read_results(part, header, advice=f"choose another --out, or remove {part.name}")
    remaining = [n for n in range(len(conversations)) if "answer" not in results.get(str(n), {})]
    done = len(conversations) - len(remaining)
    with open_results(part, header, results.values()) as write:
        progress(done, len(conversations))
        answers = model.answers([conversations[n][:-1] for n in remaining], generation)
        outcomes = (
            (
                str(remaining[index]),
                answer
                if isinstance(answer, Exception)
                else {"answer": answer.text, "ended": answer.ended},
            )
            for index, answer in answers
        )
        for result in to_results(outcomes):
            write(result)
            results[result["id"]] = result
            done += 1
            progress(done, len(conversations))
    lines, counts = _pair(conversations, results)
    if not counts.pairs:
        first = f" (the first: {counts.first_error})" if counts.failed else ""
        raise DataError(
            f"no pairs from {len(conversations):,} conversations: {counts.failed:,} failed{first}, "
            f"{counts.equal:,} answers equal those of the data, {counts.empty:,} are empty"
        )
    write_atomically(out, "".join(lines))
    if not counts.failed:
        part.unlink()
    return counts


def _pair(
    conversations: Sequence[Sequence[Message]], results: Mapping[str, Result]
) -> tuple[list[str], PairCounts]:
    """Return the pairs as lines of JSON, and the counts."""
    lines: list[str] = []
    errors: list[str] = []
    equal = empty = cut = 0
    for number, messages in enumerate(conversations):
        result = results[str(number)]
        if "error" in result:
            errors.append(result["error"])
        elif not (answer := result["answer"].rstrip(_CUT).strip()):
            empty += 1
        elif answer == messages[-1]["content"].strip():
            equal += 1
        else:
            cut += result["ended"] is False
            rejected = [*messages[:-1], {"role": "assistant", "content": answer}]
            pair = {"chosen": messages, "rejected": rejected}
            lines.append(json.dumps(pair, ensure_ascii=False) + "\n")
    first_error = errors[0] if errors else ""
    return lines, PairCounts(len(lines), equal, empty, len(errors), cut, first_error)
