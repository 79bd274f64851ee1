"""Preference pairs from a model's own answers (SPIN: Chen et al. 2024, section 4).

The chosen side is a conversation of the data. In the rejected side the model's own answer takes the
place of the last one. Training on such pairs moves the model away from what it does wrong, such as
repetitions, without anybody having judged an answer.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind.data.input_files import list_files
from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_records
from minimind.errors import DataError, UsageError
from minimind.evaluation.runner import open_results, read_results
from minimind.evaluation.tasks import GenerationConfig, Model, Result, to_results
from minimind.files import write_atomically
from minimind.tokenizer.chat import Message

Conversation = list[Message]


@dataclass(frozen=True)
class PairCounts:
    """What became of the conversations. first_error: the error of the first one that failed."""

    pairs: int
    equal: int  # the model gave the answer of the data
    empty: int
    failed: int
    first_error: str = ""


def read_conversations(
    paths: Sequence[str], limit: int
) -> tuple[list[Conversation], InvalidRecords]:
    """Return conversations that end with an answer, at most `limit`, evenly spaced over all.

    Texts, preference pairs, and conversations whose last answer is excluded from the loss are
    skipped. Raises DataError if none is left.
    """
    # Counted first, and then read again, because only `limit` of them have to fit into memory.
    total = sum(1 for _ in _suitable(paths, InvalidRecords()))
    invalid = InvalidRecords()
    conversations = [
        conversation
        for number, conversation in enumerate(_suitable(paths, invalid))
        if number * limit // total != (number - 1) * limit // total
    ]
    if not conversations:
        raise DataError(
            f"{', '.join(paths)}: no conversation that ends with an answer; give data as for "
            "`minimind sft`"
        )
    return conversations, invalid


def _suitable(paths: Sequence[str], invalid: InvalidRecords) -> Iterator[Conversation]:
    for path in paths:
        for record in read_records(list_files(path), invalid=invalid):
            messages = record.messages
            if not messages or len(messages) < 2 or messages[-1]["role"] != "assistant":
                continue
            if len(messages) - 1 in (record.unsupervised or ((),))[0]:
                continue
            yield messages


def write_pairs(
    model: Model,
    conversations: Sequence[Conversation],
    out: Path,
    *,
    generation: GenerationConfig,
    identity: Mapping[str, Any],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PairCounts:
    """Answer the conversations, and write a JSON Lines file of preference pairs.

    Until all are answered, the answers are in OUT.part, so that the same call continues. identity:
    everything that answers depend on besides the other arguments. Raises DataError if no pair is
    left, and UsageError if OUT.part has answers of another model or other data.
    """
    part = out.with_name(f"{out.name}.part")
    header = {
        "task": "own answers",
        "conversations": hashlib.sha256(json.dumps(list(conversations)).encode()).hexdigest(),
        "max_new_tokens": generation.max_new_tokens,
        "temperature": generation.temperature,
        "seed": generation.seed if generation.temperature else None,
        **identity,
    }
    results = _read_part(part, header)
    done = {name: result for name, result in results.items() if "error" not in result}
    with open_results(part, header, done.values()) as write:
        progress(len(done), len(conversations))
        for count, result in enumerate(_answer(model, conversations, done, generation), 1):
            write(result)
            results[result["id"]] = result
            progress(len(done) + count, len(conversations))
    errors = [result["error"] for result in results.values() if "error" in result]
    pairs, equal, empty = [], 0, 0
    for number, messages in enumerate(conversations):
        answer = results[str(number)].get("answer")
        if answer is None:
            continue
        if not answer:
            empty += 1
        elif answer == messages[-1]["content"].strip():
            equal += 1
        else:
            rejected = [*messages[:-1], {"role": "assistant", "content": answer}]
            pairs.append({"chosen": messages, "rejected": rejected})
    if not pairs:
        first = f" (the first: {errors[0]})" if errors else ""
        raise DataError(
            f"no pairs from {len(conversations):,} conversations: {len(errors):,} failed{first}, "
            f"{equal:,} answers equal those of the data, {empty:,} are empty"
        )
    lines = (json.dumps(pair, ensure_ascii=False) for pair in pairs)
    write_atomically(out, "".join(f"{line}\n" for line in lines))
    part.unlink()
    return PairCounts(len(pairs), equal, empty, len(errors), *errors[:1])


def _read_part(part: Path, header: Mapping[str, Any]) -> dict[str, Result]:
    try:
        return read_results(part, header)
    except UsageError:
        raise UsageError(
            f"{part}: has answers of another model, other data or other settings; repeat the "
            "command that began it, choose another --out, or remove it"
        ) from None


def _answer(
    model: Model,
    conversations: Sequence[Conversation],
    done: Mapping[str, Result],
    generation: GenerationConfig,
) -> Iterable[Result]:
    """Yield the results of the conversations that are not in `done`."""
    remaining = [number for number in range(len(conversations)) if str(number) not in done]
    answers = model.answers([conversations[number][:-1] for number in remaining], generation)
    return to_results(
        (
            str(remaining[index]),
            answer if isinstance(answer, Exception) else {"answer": answer.text},
        )
        for index, answer in answers
    )
