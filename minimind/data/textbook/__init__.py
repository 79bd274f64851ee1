"""The textbook: facts written for this project, and all that is made from them.

A corpus of any size to train on, the same for the same seed, and a quiz in words that were never
trained on.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from minimind.data.textbook.makers import dialogues, exams, preferences, prose
from minimind.data.textbook.quiz import (
    EIGHT,
    QuizQuestion,
    eight,
    is_fluent,
    is_right,
    quiz,
    sample_quiz,
)
from minimind.data.textbook.tables import Subject, load_subjects

__all__ = [
    "EIGHT",
    "QuizQuestion",
    "Subject",
    "dialogues",
    "eight",
    "exams",
    "is_fluent",
    "is_right",
    "load_subjects",
    "preferences",
    "prose",
    "quiz",
    "sample_quiz",
    "write_corpus",
]

_HELD_OUT_SEED = 1 << 20


def write_corpus(
    out: Path,
    *,
    seed: int,
    prose_characters: int,
    held_out_characters: int,
    single_turn: int,
    multi_turn: int,
    preference_pairs: int,
    exam_questions: int,
) -> dict[str, Path]:
    """Write the corpus as JSON lines into `out`, sizes in characters, dialogues, pairs, questions.

    pretrain.jsonl, held-out.jsonl {"text"}; sft-single.jsonl, sft-multi.jsonl {"conversations"};
    dpo.jsonl {"chosen", "rejected"}; exam.jsonl. The path of each, by its name without ending.
    No text is both in pretrain and in held-out.
    """
    out.mkdir(parents=True, exist_ok=True)
    training = list(_characters(prose(seed), prose_characters))
    known = set(training)
    fresh = (text for text in prose(seed + _HELD_OUT_SEED) if text not in known)
    contents: dict[str, Iterable[Any]] = {
        "pretrain": ({"text": text} for text in training),
        "held-out": ({"text": text} for text in _characters(fresh, held_out_characters)),
        "sft-single": _talks(seed, "single", single_turn),
        "sft-multi": _talks(seed, "multi", multi_turn),
        "dpo": islice(preferences(seed), preference_pairs),
        "exam": islice(exams(seed), exam_questions),
    }
    paths = {name: out / f"{name}.jsonl" for name in contents}
    for name, records in contents.items():
        with paths[name].open("w", encoding="utf-8") as stream:
            for record in records:
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    return paths


def _characters(texts: Iterator[str], size: int) -> Iterator[str]:
    """Texts until there are `size` characters."""
    while size > 0:
        text = next(texts)
        size -= len(text)
        yield text


def _talks(seed: int, turns: Any, number: int) -> Iterator[dict[str, Any]]:
    return ({"conversations": talk} for talk in islice(dialogues(seed, turns), number))
