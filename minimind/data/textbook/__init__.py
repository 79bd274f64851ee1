"""The textbook: facts written for this project, and all that is made from them.

A corpus of any size to train on, the same for the same seed, and a quiz in words that were never
trained on.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from minimind.data.stamps import sha256_of
from minimind.data.textbook.fluency import is_fluent
from minimind.data.textbook.identity import IdentityQuestion, held_out_identity, identity
from minimind.data.textbook.makers import dialogues, exams, preferences, prose
from minimind.data.textbook.quiz import (
    EIGHT,
    QuizQuestion,
    eight,
    is_right,
    is_well_formed,
    quiz,
    sample_quiz,
)
from minimind.data.textbook.tables import Subject, load_subjects
from minimind.errors import ConfigError, DataError, ResourceError

__all__ = [
    "EIGHT",
    "IdentityQuestion",
    "QuizQuestion",
    "Subject",
    "dialogues",
    "eight",
    "exams",
    "held_out_identity",
    "identity",
    "is_fluent",
    "is_right",
    "is_well_formed",
    "load_subjects",
    "preferences",
    "prose",
    "quiz",
    "sample_quiz",
    "textbook_file",
    "write_corpus",
]

_HELD_OUT_SEED = 1 << 20
_IN_RECIPES = "textbook:"


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
    identity_dialogues: int = 3_000,
) -> dict[str, Path]:
    """Write the corpus as JSON lines into `out`, sizes in characters, dialogues, pairs, questions.

    pretrain.jsonl, held-out.jsonl {"text"}; sft-single.jsonl, sft-multi.jsonl, identity.jsonl
    {"conversations"}, the last with {{name}} and {{author}} in it; dpo.jsonl {"chosen",
    "rejected"}; exam.jsonl. The path of each, by its name without ending.
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
        "identity": _conversations(identity(seed), identity_dialogues),
    }
    paths = {name: out / f"{name}.jsonl" for name in contents}
    for name, records in contents.items():
        _write(paths[name], records)
    return paths


def textbook_file(path: str, folder: Path, fill: Mapping[str, str]) -> str:
    """`path`, or for `textbook:NAME` a file in `folder` that is made if it is not there.

    A recipe so has data without the user having files: identity (dialogues in which the model
    says who it is), dialogues (questions about the facts), general (the same, other dialogues).
    Raises DataError for another name, and ConfigError when identity is not told whose.
    """
    if not path.startswith(_IN_RECIPES) or os.path.exists(path):
        return path
    name = path.removeprefix(_IN_RECIPES)
    makers: dict[str, Callable[[], Iterable[Any]]] = {
        "identity": lambda: _conversations(identity(0), 3_000),
        "dialogues": lambda: _talks(_HELD_OUT_SEED, "single", 6_000),
        "general": lambda: _talks(_HELD_OUT_SEED + 1, "single", 600),
    }
    if name not in makers:
        raise DataError(f"{path}: the textbook has no such part; it has {', '.join(makers)}")
    missing = [key for key in ("name", "author") if not fill.get(key)]
    if name == "identity" and missing:
        raise ConfigError(
            "textbook:identity teaches the model a name and an author; give "
            + " ".join(f"data.variables.{key}=…" for key in missing)
        )
    place = folder / f"textbook-{name}.jsonl"
    checksum = place.with_name(f"{place.name}.sha256")
    making = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_current(place, checksum):
            _write(making, makers[name]())
            os.replace(making, place)
            making.write_text(_checksum(place), encoding="utf-8")
            os.replace(making, checksum)
    except OSError as error:
        raise ResourceError(
            f"{place}: cannot be written ({error.strerror}); "
            "give another folder with data.store=DIR"
        ) from error
    finally:
        making.unlink(missing_ok=True)
    return str(place)


def _is_current(place: Path, checksum: Path) -> bool:
    """Whether the file is whole, and made from this version of the textbook."""
    return (
        place.is_file()
        and checksum.is_file()
        and checksum.read_text("utf-8", errors="replace") == _checksum(place)
    )


def _checksum(place: Path) -> str:
    return f"{sha256_of(place)} {_version()}\n"


@cache
def _version() -> str:
    """Hash of the tables and the code that the textbook is made from."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*")):
        if file.suffix in (".py", ".toml", ".tsv"):
            digest.update(f"{file.name}\0{sha256_of(file)}\0".encode())
    return digest.hexdigest()


def _write(path: Path, records: Iterable[Any]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def _characters(texts: Iterator[str], size: int) -> Iterator[str]:
    """Texts until there are `size` characters."""
    while size > 0:
        text = next(texts)
        size -= len(text)
        yield text


def _talks(seed: int, turns: Any, number: int) -> Iterator[dict[str, Any]]:
    return _conversations(dialogues(seed, turns), number)


def _conversations(talks: Iterator[Any], number: int) -> Iterator[dict[str, Any]]:
    return ({"conversations": talk} for talk in islice(talks, number))
