"""Exams of multiple choice, read from the layouts that they are published in.

    <name>.jsonl (.zst, .gz, …)       a question a line: {"id", "subject", "split", "question",
                                      "A", "B", …, "answer"}, with "passage" if there is any
    {dev,val,test}/<subject>_val.csv  C-Eval and MMLU
    {dev,test}/<subject>.csv          CMMLU
    a .zip or .tar.* of these         as it is downloaded
    FILE.csv                          any of the columns question, A, B, …, answer

MMLU's files have no header. The questions of the split "dev" are examples for the others.
"""

import csv
import hashlib
import io
import re
import shutil
import string
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from minimind.data.hub import download_hint
from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_objects
from minimind.errors import DataError
from minimind.paths import expand_user

LETTERS = string.ascii_uppercase[:8]
_TABLES = re.compile(r"(?:.*/)?(dev|val|test)/([\w-]+?)(?:_(?:dev|val|test))?\.csv", re.IGNORECASE)
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
_HEADERLESS = ["question", "a", "b", "c", "d", "answer"]
_LONGEST_FIELD = 1 << 20


@dataclass(frozen=True)
class Benchmark:
    """What is known of an exam: its questions' split, language, and the folders it comes in."""

    name: str
    split: str
    language: str
    folders: tuple[str, ...] = ()


BENCHMARKS = {
    exam.name: exam
    for exam in (
        Benchmark("ceval", "val", "zh", ("ceval", "ceval-exam")),
        Benchmark("cmmlu", "test", "zh", ("cmmlu",)),
        Benchmark("mmlu", "test", "en", ("mmlu",)),
        Benchmark("c3", "test", "zh"),
    )
}


@dataclass(frozen=True)
class Question:
    """One question; `answer` is the place of the right one among the options."""

    id: str
    subject: str
    question: str
    options: tuple[str, ...]
    answer: int
    passage: str = ""

    @property
    def letter(self) -> str:
        """Of the right option."""
        return LETTERS[self.answer]

    def as_text(self) -> str:
        """The question and its options, a line each."""
        return "\n".join((self.question, *self.options))


@dataclass
class Questions:
    """An exam as it was read: what is asked, examples of each subject, what could not be read."""

    exam: Benchmark
    asked: list[Question] = field(default_factory=list)
    examples: dict[str, list[Question]] = field(default_factory=dict)
    bad: InvalidRecords = field(default_factory=InvalidRecords)

    def sha256(self) -> str:
        """Names the questions and the examples."""
        digest = hashlib.sha256()
        for question in [*self.asked, *(q for some in self.examples.values() for q in some)]:
            digest.update(repr(question).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class SubjectInfo:
    """A subject's name as prompts say it, and the group that it is counted in."""

    name: str
    group: str


@cache
def subjects(exam: str) -> dict[str, SubjectInfo]:
    """The subjects of an exam, by the names that files give them.

    Names are those of lm-eval's descriptions, groups those of the exams' authors.
    """
    path = Path(__file__).with_name("subjects.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["exam"] == exam]
    return {row["subject"]: SubjectInfo(row["name"], row["group"]) for row in rows}


def subject_info(exam: str, subject: str) -> SubjectInfo:
    """Of a subject that nobody knows: its own name, in the group "other"."""
    return subjects(exam).get(subject) or SubjectInfo(subject.replace("_", " "), "other")


def read_benchmark(name: str, places: Sequence[str]) -> Questions:
    """The exam `name` in the first of the places that has it; any other name: the place itself.

    Questions that cannot be read are put aside in `bad`. Raises DataError where there is none.
    """
    exam = BENCHMARKS.get(name)
    for place in places:
        path = expand_user(place)
        if not path.exists():
            raise DataError(f"{place}: there is no such file or folder; give --data a folder")
        with _found(exam, path) as found:
            if found:
                return _questions(exam or Benchmark(path.stem, "test", ""), found)
    known = f"{name}.jsonl, or {' or '.join(exam.folders)}" if exam and exam.folders else name
    raise DataError(
        f"{', '.join(places) or '--data'}: holds no {name} ({known}). Put it there, or name it: "
        f"--task {name}:PATH{download_hint(name)}"
    )


@contextmanager
def _found(exam: Benchmark | None, place: Path) -> Iterator[list[tuple[str | None, str, Path]]]:
    """(split, subject, file) of what holds the exam; "" and None are told by the records."""
    if place.is_file() and not place.name.endswith(_ARCHIVES):
        yield [(None, "", place)]
        return
    if exam is None:
        raise DataError(f"{place}: give a file with the columns question, A, B, …, answer")
    names = (exam.name, *exam.folders)
    if place.is_dir():
        whole = sorted(p for p in place.glob(f"{exam.name}.*") if _format(p) in (".jsonl", ".json"))
        if whole:
            yield [(None, "", whole[0])]
            return
        if tables := _tables(exam, place):
            yield tables
            return
        archives = [p for p in sorted(place.iterdir()) if p.name.endswith(_ARCHIVES)]
        archives = [p for p in archives if p.name.startswith(names)]
    else:
        archives = [place]
    if not archives:
        yield []
        return
    with tempfile.TemporaryDirectory() as folder:
        _unpack(archives[0], Path(folder))
        yield _tables(exam, Path(folder))


def _format(path: Path) -> str:
    return next((s for s in path.suffixes if s in (".jsonl", ".json", ".csv")), "")


def _tables(exam: Benchmark, folder: Path) -> list[tuple[str | None, str, Path]]:
    """The exam's CSV files below a folder: in one of its own name, if there is such a one."""
    own = [place for name in exam.folders if (place := folder / name).is_dir()]
    own += [place for place in (folder / "data",) if place.is_dir()]
    for place in [*own, folder]:
        found: list[tuple[str | None, str, Path]] = []
        for path in sorted(place.rglob("*.csv")):
            match = _TABLES.fullmatch(path.relative_to(folder).as_posix())
            if match and match[2] in subjects(exam.name):
                found.append((match[1].lower(), match[2], path))
        if any(split == exam.split for split, _, _ in found):
            return found
    return []


def _unpack(archive: Path, folder: Path) -> None:
    """The CSV files of an archive. Raises DataError when it cannot be read."""

    def wanted(names: Iterable[str]) -> Iterator[tuple[str, Path]]:
        for number, name in enumerate(names):
            if match := _TABLES.fullmatch(name):  # a path of ours: names may lead anywhere
                split, file = match[1].lower(), name.rsplit("/", 1)[-1]
                yield name, folder / "data" / split / file if number < 10_000 else folder / file

    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as packed:
                for name, path in wanted(packed.namelist()):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(packed.read(name))
            return
        with tarfile.open(archive) as tar:
            files = {member.name: member for member in tar.getmembers() if member.isfile()}
            for name, path in wanted(files):
                path.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(files[name])
                assert content is not None
                with content, path.open("wb") as out:
                    shutil.copyfileobj(content, out)
    except (OSError, EOFError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive}: cannot be unpacked ({error}); download it again") from error


def _questions(exam: Benchmark, files: Sequence[tuple[str | None, str, Path]]) -> Questions:
    found, ids = Questions(exam), Counter[str]()
    for split, subject, path in files:
        rows = _csv_rows(path, found.bad) if _format(path) == ".csv" else _records(path, found.bad)
        for line, row in rows:
            try:
                belongs = split or str(row.get("split") or exam.split)
                if belongs not in ("dev", exam.split):
                    continue
                question = _question(row, subject or str(row.get("subject") or path.stem), line)
            except ValueError as error:
                found.bad.add(path, line, str(error), row)
                continue
            found.bad.num_valid += 1
            ids[question.id] += 1
            if ids[question.id] > 1:  # results go by it
                question = replace(question, id=f"{question.id} ({ids[question.id]})")
            if belongs == exam.split:
                found.asked.append(question)
            else:
                found.examples.setdefault(question.subject, []).append(question)
    if not found.asked:
        why = f"; the first of what cannot be read: {found.bad.first}" if found.bad.total else ""
        raise DataError(f"{files[0][2]}: there is no question with an answer in it{why}")
    return found


def _records(path: Path, bad: InvalidRecords) -> Iterator[tuple[int, dict[str, Any]]]:
    for _, line, row in read_objects([path], invalid=bad):
        yield line, row


def _question(row: dict[str, Any], subject: str, line: int) -> Question:
    """Raises ValueError with the reason why the row is no question."""
    fields = {str(name).strip().lower(): value for name, value in row.items() if name is not None}
    text = _text(fields.get("question"))
    if not text.strip():
        raise ValueError("no question")
    options: list[str] = []
    for letter in LETTERS:
        option = _text(fields.get(letter.lower()))
        if not option.strip():
            break
        options.append(option)
    if len(options) < 2:
        raise ValueError("fewer than two options (columns A, B, …)")
    answer = _text(fields.get("answer")).strip().upper()
    if len(answer) != 1 or answer not in LETTERS[: len(options)]:
        raise ValueError(f"the answer {answer[:20]!r} is not the letter of an option")
    name = _text(fields.get("id")).strip() or str(line)
    # Published CSV files number the questions of each subject from 0.
    identity = name if subject in name or not subject else f"{subject}-{name}"
    return Question(
        identity,
        subject,
        text,
        tuple(options),
        LETTERS.index(answer),
        _text(fields.get("passage")),
    )


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _csv_rows(path: Path, bad: InvalidRecords) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows as the header names them, or as MMLU orders them where there is no header."""
    csv.field_size_limit(_LONGEST_FIELD)
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(
            f"{path}: not UTF-8; convert it: iconv -f GB18030 -t UTF-8 OLD > NEW"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    reader = csv.reader(io.StringIO(text, newline=""))
    header: list[str] | None = None
    try:
        for row in reader:
            if header is None:
                named = [name.strip().lower() for name in row]
                if {"question", "answer"} <= set(named):
                    header = named
                    continue
                header = list(_HEADERLESS)
            if row and len(row) != len(header):
                bad.add(path, reader.line_num, f"{len(row)} fields instead of {len(header)}", row)
            elif row:
                yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        bad.add(path, reader.line_num, f"not CSV: {error}")
