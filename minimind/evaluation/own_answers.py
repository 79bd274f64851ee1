"""Preference pairs from a model's own answers (SPIN: Chen et al. 2024, section 4).

The chosen side is a conversation of the data. In the rejected side the model's own answer takes the
place of the last one. Training on such pairs lowers the probability of habits that the model has
and the data lacks, such as repetitions. Nobody has judged an answer, so they do not reflect human
preferences.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from minimind.data.input_files import list_files
from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_records
from minimind.data.schemas import Record, variables_in
from minimind.errors import DataError, UsageError
from minimind.evaluation.runner import open_results, read_results
from minimind.evaluation.tasks import GenerationConfig, Model, Result, evenly_spaced, to_results
from minimind.files import write_atomically
from minimind.tokenizer.chat import Message

_SUITABLE, _NO_ANSWER, _VARIABLES = "suitable", "no answer", "variables"
_CUT = "\ufffd"  # the end of an answer that the token limit cut within a character


@dataclass(frozen=True)
class AnsweredData:
    """Conversations whose last answer a model is to replace.

    unsuitable: records that are left out because they do not end with a supervised answer.
    with_variables: records that are left out for template variables without a value.
    """

    conversations: Sequence[Sequence[Message]]
    unsuitable: int
    with_variables: int
    invalid: InvalidRecords

    def sha256(self) -> str:
        """Return a hash of the conversations."""
        return hashlib.sha256(json.dumps(list(self.conversations)).encode()).hexdigest()


@dataclass(frozen=True)
class PairCounts:
    """Number of pairs, and of answers without one: equal to that of the data, empty, failed.

    unanswerable: conversations that cannot be answered, such as those that exceed the context.
    cut: pairs whose rejected answer the token limit cut off. discarded: answers of an earlier run
    that do not fit this one.
    """

    pairs: int
    equal: int = 0
    empty: int = 0
    failed: int = 0
    unanswerable: int = 0
    cut: int = 0
    discarded: int = 0
    first_error: str = ""


def read_conversations(
    paths: Sequence[str], limit: int, variables: Mapping[str, str] = MappingProxyType({})
) -> AnsweredData:
    """Read at most `limit` conversations that end with an answer, evenly spaced over all.

    variables: values of template variables; conversations with others are left out. Raises
    DataError if there is none.
    """
    # Counted first, and then read again, because only `limit` of them have to fit into memory.
    invalid = InvalidRecords()
    counts = Counter(_suitability(record) for record in _read(paths, variables, invalid))
    total = counts[_SUITABLE]
    if not total:
        variable = f", {counts[_VARIABLES]:,} with template variables" * bool(counts[_VARIABLES])
        first = f"; the first invalid record: {invalid.first}" if invalid.total else ""
        raise DataError(
            f"{', '.join(paths)}: no conversation that ends with an answer{variable}{first}"
        )
    chosen = set(evenly_spaced(range(total), limit))
    records = _read(paths, variables, InvalidRecords())
    suitable = (record for record in records if _suitability(record) == _SUITABLE)
    conversations = [
        record.messages
        for number, record in enumerate(suitable)
        if number in chosen and record.messages
    ]
    return AnsweredData(conversations, counts[_NO_ANSWER], counts[_VARIABLES], invalid)


def check_conversations(paths: Sequence[str], variables: Mapping[str, str]) -> None:
    """Raise DataError if no conversation ends with an answer. Reads up to the first that does."""
    records = _read(paths, variables, InvalidRecords())
    if not any(_suitability(record) == _SUITABLE for record in records):
        read_conversations(paths, 1, variables)


def _read(
    paths: Sequence[str], variables: Mapping[str, str], invalid: InvalidRecords
) -> Iterator[Record]:
    for path in paths:
        for record in read_records(list_files(path), invalid=invalid):
            yield record.substitute(variables)


def _suitability(record: Record) -> str:
    if not _ends_with_answer(record):
        return _NO_ANSWER
    contents = (message["content"] for message in record.messages or ())
    return _VARIABLES if any(map(variables_in, contents)) else _SUITABLE


def _ends_with_answer(record: Record) -> bool:
    """Return True for a conversation whose last message is an answer that is supervised."""
    if not record.messages or len(record.messages) < 2:
        return False
    [(messages, unsupervised)] = record.conversations
    return messages[-1]["role"] == "assistant" and len(messages) - 1 not in unsupervised


def partial_file(out: Path) -> Path:
    """Return the file with the answers so far, until the pairs are written."""
    return out.with_name(f"{out.name}.part")


def write_pairs(
    model: Model,
    data: AnsweredData,
    out: Path,
    *,
    generation: GenerationConfig,
    identity: Mapping[str, Any],
    replace: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PairCounts:
    """Answer the conversations, and write a JSON Lines file of preference pairs.

    Each answer is written to `partial_file(out)` at once, so that the same call continues after an
    interruption. The file stays if answers failed, so that they can be repeated. identity:
    everything that answers depend on besides the other arguments. replace: discard answers of
    another model or to other conversations; otherwise they raise UsageError. Raises DataError if
    there is no pair.
    """
    conversations, part = data.conversations, partial_file(out)
    header = {
        "task": "own answers",
        "conversations": data.sha256(),
        "max_new_tokens": generation.max_new_tokens,
        "temperature": generation.temperature,
        "seed": generation.seed if generation.temperature else None,
        **identity,
    }
    files = f"{part.name} and {out.name}" if out.exists() else part.name
    discarded = 0
    try:
        earlier = read_results(part, header, advice=f"choose another --out, or remove {files}")
    except UsageError:
        if not replace:
            raise
        discarded = part.read_bytes().count(b"\n") - 1  # without the header
        earlier = {}
    results = {
        name: result
        for name, result in earlier.items()
        if "error" not in result or result.get("permanent")
    }
    remaining = [n for n in range(len(conversations)) if str(n) not in results]
    # Those that failed before come last: if they fail again, the others are answered.
    remaining.sort(key=lambda n: str(n) in earlier)
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
        first = f" (the first: {counts.first_error})" if counts.first_error else ""
        raise DataError(
            f"no pairs from {len(conversations):,} conversations: "
            f"{counts.failed + counts.unanswerable:,} failed{first}, "
            f"{counts.equal:,} answers equal those of the data, {counts.empty:,} are empty"
        )
    write_atomically(out, "".join(lines))
    if not counts.failed:
        part.unlink()
    return dataclasses.replace(counts, discarded=discarded)


def _pair(
    conversations: Sequence[Sequence[Message]], results: Mapping[str, Result]
) -> tuple[list[str], PairCounts]:
    """Return the pairs as lines of JSON, and the counts."""
    lines: list[str] = []
    errors: list[str] = []
    equal = empty = cut = unanswerable = 0
    for number, messages in enumerate(conversations):
        result = results[str(number)]
        if "error" in result:
            errors.append(result["error"])
            unanswerable += result.get("permanent", False)
        elif not (answer := result["answer"].rstrip(_CUT).strip()):
            empty += 1
        elif answer == messages[-1]["content"].strip():
            equal += 1
        else:
            cut += result["ended"] is False
            rejected = [*messages[:-1], {"role": "assistant", "content": answer}]
            pair = {"chosen": messages, "rejected": rejected}
            lines.append(json.dumps(pair, ensure_ascii=False) + "\n")
    return lines, PairCounts(
        len(lines),
        equal,
        empty,
        failed=len(errors) - unanswerable,
        unanswerable=unanswerable,
        cut=cut,
        first_error=errors[0] if errors else "",
    )
