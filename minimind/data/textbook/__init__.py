"""The textbook: facts written for this project, and everything generated from them.

It provides a training corpus of any size, which depends only on the seed, and a quiz. The quiz
questions are held out: they are worded differently from all questions in the corpus.

Reading order: tables (facts, their templates), phrases (framing of questions), generators (streams
of training data), quiz and fluency (evaluation of answers), identity (the name of the model), lint
(checks of the tables; `python -m minimind.data.textbook` runs them).
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from minimind.data.stamps import sha256_of
from minimind.data.textbook.fluency import is_fluent
from minimind.data.textbook.generators import dialogues, multiple_choice, preferences, prose
from minimind.data.textbook.identity import IdentityQuestion, held_out_identity, identity
from minimind.data.textbook.quiz import (
    DEMO_QUESTIONS,
    QuizQuestion,
    demo_questions,
    is_correct,
    is_well_formed,
    quiz,
    sample_quiz,
)
from minimind.data.textbook.tables import Subject, load_subjects
from minimind.errors import ConfigError, DataError, ResourceError
from minimind.files import atomic_file, write_atomically

__all__ = [
    "DEMO_QUESTIONS",
    "IdentityQuestion",
    "QuizQuestion",
    "Subject",
    "demo_questions",
    "dialogues",
    "held_out_identity",
    "identity",
    "is_correct",
    "is_fluent",
    "is_textbook",
    "is_well_formed",
    "load_subjects",
    "multiple_choice",
    "preferences",
    "prose",
    "quiz",
    "sample_quiz",
    "textbook_file",
    "write_corpus",
]

_HELD_OUT_SEED = 1 << 20
_PREFIX = "textbook:"


def write_corpus(
    out: Path,
    *,
    seed: int,
    prose_characters: int,
    held_out_characters: int,
    single_turn: int,
    multi_turn: int,
    preference_pairs: int,
    multiple_choice_questions: int,
    identity_dialogues: int = 3_000,
) -> dict[str, Path]:
    """Write the corpus as JSON Lines into `out`; return the path of each file by its stem.

    pretrain.jsonl, held-out.jsonl: {"text"}, without common texts. sft-single.jsonl,
    sft-multi.jsonl, identity.jsonl: {"conversations"}, the last with the variables {{name}} and
    {{author}}. dpo.jsonl: {"chosen", "rejected"}. multiple-choice.jsonl: questions with four
    options.
    """
    out.mkdir(parents=True, exist_ok=True)
    training = list(_limited(prose(seed), prose_characters))
    known = set(training)
    unseen = (text for text in prose(seed + _HELD_OUT_SEED) if text not in known)
    contents: dict[str, Iterable[Any]] = {
        "pretrain": ({"text": text} for text in training),
        "held-out": ({"text": text} for text in _limited(unseen, held_out_characters)),
        "sft-single": _dialogue_records(seed, "single", single_turn),
        "sft-multi": _dialogue_records(seed, "multi", multi_turn),
        "dpo": islice(preferences(seed), preference_pairs),
        "multiple-choice": islice(multiple_choice(seed), multiple_choice_questions),
        "identity": _conversation_records(identity(seed), identity_dialogues),
    }
    paths = {name: out / f"{name}.jsonl" for name in contents}
    for name, records in contents.items():
        _write(paths[name], records)
    return paths


def is_textbook(path: str) -> bool:
    """Return True if `path` stands for data of the textbook, and for no file that exists."""
    return path.startswith(_PREFIX) and not os.path.exists(path)


def textbook_file(path: str, folder: Path, variables: Mapping[str, str]) -> str:
    """Return `path`; for `textbook:NAME`, the path of a file in `folder`, generated if necessary.

    NAME is one of: identity (dialogues about the model's name and author),
    dialogues (questions about the facts), retention (other dialogues of the same kind). Raises
    DataError for an unknown name, and ConfigError when identity lacks the variables name or author.
    """
    if not is_textbook(path):
        return path
    name = path.removeprefix(_PREFIX)
    generators: dict[str, Callable[[], Iterable[Any]]] = {
        "identity": lambda: _conversation_records(identity(0), 3_000),
        "dialogues": lambda: _dialogue_records(_HELD_OUT_SEED, "single", 6_000),
        "retention": lambda: _dialogue_records(_HELD_OUT_SEED + 1, "single", 600),
    }
    if name not in generators:
        raise DataError(f"{path}: the textbook has no such data; it has {', '.join(generators)}")
    missing = [key for key in ("name", "author") if not variables.get(key)]
    if name == "identity" and missing:
        raise ConfigError(
            "textbook:identity teaches the model a name and an author; set "
            + " ".join(f"data.variables.{key}=…" for key in missing)
        )
    target = folder / f"textbook-{name}.jsonl"
    checksum = target.with_name(f"{target.name}.sha256")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_current(target, checksum):
            with atomic_file(target) as temporary:
                _write(temporary, generators[name]())
            write_atomically(checksum, _checksum(target))
    except OSError as error:
        raise ResourceError(
            f"{target}: cannot be written ({error.strerror}); "
            "choose another folder with data.store=DIR"
        ) from error
    return str(target)


def _is_current(file: Path, checksum: Path) -> bool:
    """Return True if the file is intact and was generated by this version of the textbook."""
    return (
        file.is_file()
        and checksum.is_file()
        and checksum.read_text("utf-8", errors="replace") == _checksum(file)
    )


def _checksum(file: Path) -> str:
    return f"{sha256_of(file)} {_version()}\n"


@cache
def _version() -> str:
    """Return the hash of the tables and the code that generate the textbook."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*")):
        if file.suffix in (".py", ".toml", ".tsv"):
            digest.update(f"{file.name}\0{sha256_of(file)}\0".encode())
    return digest.hexdigest()


def _write(path: Path, records: Iterable[Any]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def _limited(texts: Iterator[str], num_characters: int) -> Iterator[str]:
    """Yield texts until they have at least `num_characters` in total."""
    while num_characters > 0:
        text = next(texts)
        num_characters -= len(text)
        yield text


def _dialogue_records(
    seed: int, turns: Literal["single", "multi"], count: int
) -> Iterator[dict[str, Any]]:
    return _conversation_records(dialogues(seed, turns), count)


def _conversation_records(conversations: Iterator[Any], count: int) -> Iterator[dict[str, Any]]:
    return ({"conversations": messages} for messages in islice(conversations, count))
